"""One adapted model in Transformers' own server: how requests become prompts, and prompts text.

The parts of ``transformers serve`` are no documented API; this file and ``server.py`` alone use them.
"""

import asyncio
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import (
    BatchEncoding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState
from typing_extensions import override

from gatera_lightning.backbone.loading import context_length
from gatera_lightning.datamodules.prompts.conversation_prompts import ConversationPrompts
from gatera_lightning.datamodules.prompts.conversations import Chat, Instruction
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.generation.decoding import end_tokens
from gatera_lightning.generation.drafting import Drafter
from gatera_lightning.generation.served_drafts import DraftingModel


@dataclass(frozen=True)
class PromptFormat:
    """What Transformers' handlers call the processor: it tokenizes prompts as ``chat`` and ``generate`` do.

    Attributes:
        template: The prompt template of chat requests.
        plain_tokenizer: The tokenizer, which answers everything else.
    """

    template: Template
    plain_tokenizer: PreTrainedTokenizerBase

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain_tokenizer, name)

    def __call__(self, prompt: str, **_: Any) -> BatchEncoding:
        """Tokenize the prompt of ``/v1/completions``, which no template changes."""
        return _encoded(tokenize_prompt(self.plain_tokenizer, prompt))

    def apply_chat_template(
        self, messages: Sequence[Any], *, tools: Sequence[dict[str, Any]] | None = None, **_: Any
    ) -> BatchEncoding:
        """Format and tokenize the messages of ``/v1/chat/completions``.

        Raises:
            ValueError: The template cannot represent them.
        """
        prompts = ConversationPrompts(self.template, self.plain_tokenizer)
        if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
            rendered = prompts.render(Instruction(messages[0]["content"], "", ""), sys.maxsize)
        else:
            answer: Any = {"role": "assistant", "content": ""}
            rendered = prompts.render(Chat((*messages, answer), tuple(tools or ())), sys.maxsize)
        special = self.template != "chat"
        return _encoded(tokenize_prompt(self.plain_tokenizer, rendered.text, special_tokens=special))


def _encoded(ids: list[int]) -> BatchEncoding:
    tensor = torch.tensor([ids], dtype=torch.long)
    return BatchEncoding({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})


class ServedModel(ModelManager):
    """Transformers' table of models, with one entry that is never unloaded; it loads no others."""

    def __init__(
        self, name: str, model: PreTrainedModel, prompts: PromptFormat, drafter: Drafter | None = None
    ) -> None:
        """Take a model that is loaded.

        Args:
            name: What requests call the model.
            model: The adapted model, in eval mode. Its published generation settings are replaced by greedy
                decoding, which ``generate`` uses too.
            prompts: How its prompts are formatted.
            drafter: What answers requests with drafts, if anything.
        """
        super().__init__(model_timeout=-1)
        self.force_model = name
        self._model, self._prompts = model, prompts
        tokenizer = prompts.plain_tokenizer
        model.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            eos_token_id=end_tokens(model, int(tokenizer.eos_token_id)),
            pad_token_id=tokenizer.pad_token_id,
        )
        self.generator = model if drafter is None else DraftingModel(model, drafter)
        """What generates answers."""

    @override
    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return the model, whose name the handlers have checked."""
        return self._model, self._prompts

    @override
    def shutdown(self) -> None:
        """Do nothing: a client must not unload the model."""

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the one model, instead of those in the hub's cache."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "gatera_lightning"}]


class Abandoned(StoppingCriteria):
    """Ends a generation whose client has gone, before its next token."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """End the generation, from any thread."""
        self._event.set()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether each sequence is done, (batch,)."""
        return torch.full(input_ids.shape[:1], self._event.is_set(), device=input_ids.device)


class SequentialGeneration(GenerateManager):
    """Generates for one request after another, within the model's context.

    Args:
        generator: What generates in place of the model that requests name.
    """

    def __init__(self, generator: PreTrainedModel | DraftingModel) -> None:
        super().__init__()
        self._generator: Any = generator

    def _fit(self, model: PreTrainedModel, inputs: Any, config: GenerationConfig) -> None:
        """Limit the answer to what the prompt leaves of the context; refuse a prompt that fills it."""
        limit, length = context_length(model.config), inputs["input_ids"].shape[-1]
        if length == 0:
            raise HTTPException(400, "the prompt has no tokens; accepted: a text")
        if limit is None:
            return
        if length >= limit:
            raise HTTPException(
                400, f"the prompt has {length:,} tokens; accepted by this model: less than {limit:,}"
            )
        config.max_new_tokens = min(config.max_new_tokens or limit, limit - length)

    @override
    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(model, inputs, gen_config)
        return super().generate_streaming(
            self._generator, _tokenizer(processor), inputs, gen_config, *args, **kwargs
        )

    @override
    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(model, inputs, gen_config)
        abandoned = Abandoned()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([abandoned])}
        generation = asyncio.ensure_future(
            super().generate_non_streaming(
                self._generator, _tokenizer(processor), inputs, gen_config, *args, **kwargs
            )
        )
        try:
            # Cancelled itself, it would leave its thread with a result that nobody takes.
            return await asyncio.shield(generation)
        except asyncio.CancelledError:
            abandoned.set()
            raise


def _tokenizer(processor: Any) -> Any:
    return processor.plain_tokenizer if isinstance(processor, PromptFormat) else processor


class OneModelGeneration(GenerationState):
    """The generation of the one model."""

    def __init__(self, generator: PreTrainedModel | DraftingModel) -> None:
        super().__init__()
        self._sequential = SequentialGeneration(generator)

    @override
    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return the same manager for every request."""
        return self._sequential


class ChatRequests(ChatCompletionHandler):
    """``/v1/chat/completions``; a temperature above 0 samples, which Transformers leaves to the model."""

    @override
    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        return _sampling(body, super()._build_generation_config(body, *args, **kwargs))


class CompletionRequests(CompletionHandler):
    """``/v1/completions``, with the same sampling."""

    @override
    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        return _sampling(body, super()._build_generation_config(body, *args, **kwargs))


def _sampling(body: dict[str, Any], config: GenerationConfig) -> GenerationConfig:
    if body.get("temperature"):
        config.do_sample, config.top_k = True, 0
        # A setting of ours: Transformers keeps those that it does not know.
        config.seed = body.get("seed")  # type: ignore[attr-defined]
    else:  # settings that only sampling reads
        config.do_sample, config.temperature, config.top_p = False, None, None
    return config
