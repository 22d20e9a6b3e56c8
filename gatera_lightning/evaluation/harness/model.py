"""lm-eval's interface to an adapted model: the model ``gatera`` of EleutherAI's evaluation harness."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.backbone.loading import default_device, load_backbone
from gatera_lightning.datamodules.prompts.conversation_prompts import ConversationPrompts
from gatera_lightning.datamodules.prompts.conversations import Instruction
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.harness.rows import LocalModel

_OF_LOCAL_TASKS = ("template", "data_dir", "answer_format", "version")
"""Settings that local tasks read from the same arguments."""


@register_model("gatera")
class GateRALM(HFLM):
    """A backbone, with or without an adapter, as lm-eval evaluates it.

    lm-eval's own tasks are scored as its model ``hf`` scores them. The rows of local tasks bring their token
    ids with them, which are those of ``test``: the answer with its EOS after the adapter's prompt template.
    """

    def __init__(
        self,
        adapter: str | None = None,
        backbone: str | None = None,
        *,
        dtype: str = "auto",
        template: Template | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        **of_local_tasks: Any,
    ) -> None:
        """Load the model.

        Args:
            adapter: An adapter folder, whose backbone is loaded too.
            backbone: A model without an adapter: hub id, folder, .gguf file or package:NAME.
            dtype: Dtype of the backbone.
            template: What ``apply_chat_template`` formats prompts with; None takes the adapter's.
            batch_size: Sequences per forward pass, or ``auto``.
            max_batch_size: Largest batch size that ``auto`` tries; None is 64.
            max_length: Maximum number of tokens of a sequence; None takes the model's context.
            device: Where the model runs; None takes the accelerator if there is one.
            of_local_tasks: Settings that only local tasks read.

        Raises:
            ConfigError: The model cannot be loaded, or an argument is unknown.
            AdapterFileError: The adapter cannot be loaded.
        """
        if unknown := sorted(set(of_local_tasks) - set(_OF_LOCAL_TASKS)):
            raise ConfigError(f"model_args: {unknown[0]!r} is unknown to the model gatera")
        self._local_prompts: dict[str, list[int]] = {}
        self.source = LocalModel.of(adapter, backbone, dtype)
        self.template = self.source.template(template)
        place = default_device() if device is None else torch.device(device)
        with place:  # weights are read straight onto it
            model = load_backbone(self.source.backbone, place.type)
        if adapter is not None:
            load_adapter(model, adapter)
        super().__init__(
            pretrained=model.to(place),  # type: ignore[arg-type]
            backend="causal",
            tokenizer=self.source.tokenizer,
            softmax_dtype=torch.float32,  # as in `test`; log_softmax in bfloat16 would cost three digits
            batch_size=batch_size,
            max_batch_size=max_batch_size or 64,
            max_length=max_length,
        )

    @property
    def adapted_model(self) -> PreTrainedModel:
        """The model, with its adapter if it has one."""
        model: PreTrainedModel = self._model
        return model

    @override
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would generate it."""
        quiet = disable_tqdm or not sys.stderr.isatty()
        local = [request for request in requests if is_local(request.doc)]
        others = [request for request in requests if not is_local(request.doc)]
        found_local = iter(self._loglikelihood_tokens([_token_ids(r) for r in local], disable_tqdm=quiet))
        found_others = iter(super().loglikelihood(others, disable_tqdm=quiet) if others else ())
        return [next(found_local if is_local(request.doc) else found_others) for request in requests]

    @override
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text."""
        quiet = disable_tqdm or not sys.stderr.isatty()
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=quiet)
        return found

    @override
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated continuation of each prompt."""
        quiet = disable_tqdm or not sys.stderr.isatty()
        answers: list[tuple[Any, str]] = []
        for wants_local in (True, False):  # a batch is of one kind, see tok_batch_encode
            chosen = [request for request in requests if is_local(request.doc) is wants_local]
            prompts = {request.args[0]: list(request.doc["prompt_ids"]) for request in chosen if wants_local}
            self._local_prompts = prompts
            texts = super().generate_until(chosen, disable_tqdm=quiet) if chosen else []
            answers += zip(map(id, chosen), texts, strict=True)
        found = dict(answers)
        return [found[id(request)] for request in requests]

    @override
    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return left-padded token ids and their mask; a local row brings its own."""
        if not self._local_prompts:
            found: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
            return found
        limit = kwargs.get("left_truncate_len") or sys.maxsize
        rows = {"input_ids": [self._local_prompts[text][-limit:] for text in strings]}
        padded = self.tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    @override
    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), prepared_for_inference(self._model):
            ids: Tensor = super()._model_generate(*args, **kwargs)
        return ids

    @override
    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Format a conversation of lm-eval with the template ``chat`` or ``alpaca``.

        Args:
            chat_history: Messages with ``role`` and ``content``; in ``alpaca``, the system message and the
                few-shot examples are part of the instruction.
            add_generation_prompt: Whether the assistant speaks next; else the last message is the beginning
                of its answer.
        """
        if self.template == "chat":
            text: str = super().apply_chat_template(chat_history, add_generation_prompt)
            return text
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        request = "\n\n".join(message["content"] for message in asked)
        return self._prompts.render(Instruction(request, "", ""), sys.maxsize).text + begun

    @property
    def _prompts(self) -> ConversationPrompts:
        tokenizer: PreTrainedTokenizerBase = self.tokenizer
        return ConversationPrompts(self.template, tokenizer)

    def continuation_tokens(self, context: str, continuation: str) -> int:
        """Return how many tokens of a continuation lm-eval scores."""
        if not context:
            return len(self.tok_encode(continuation, add_special_tokens=False))
        return len(self._encode_pair(context, continuation)[1])

    @override
    def get_model_info(self) -> dict[str, Any]:
        """Describe the model; the hub is not asked."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": str(self._model.dtype).removeprefix("torch."),
            "backbone": self.source.backbone.id,
            "adapter": self.source.adapter_folder,
        }


def is_local(doc: Any) -> bool:
    """Return whether a row of lm-eval is one of a local task, which has token ids."""
    return isinstance(doc, dict) and "prompt_ids" in doc


def _token_ids(request: Any) -> tuple[tuple[str, str], list[int], list[int]]:
    doc = request.doc
    answer: Iterable[int] = doc["answer_ids"][request.idx]
    return request.args, list(doc["prompt_ids"]), list(answer)
