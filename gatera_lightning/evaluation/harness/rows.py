"""The rows of local tasks for lm-eval: read, formatted and tokenized as ``test`` does, without a hub."""

from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gatera_lightning.adapters.position_mask import missing_mask_problem
from gatera_lightning.adapters.serialization import read_adapter_config, trained_template
from gatera_lightning.backbone.config import BackboneConfig, Dtype, stored_backbone
from gatera_lightning.backbone.loading import context_length, load_config, load_tokenizer
from gatera_lightning.backbone.source import gguf_file
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.tasks.base import TaskDataModule
from gatera_lightning.datamodules.tasks.commonsense import AnswerFormat, CommonsenseDataModule
from gatera_lightning.datamodules.tasks.math import MathDataModule, parse_solution
from gatera_lightning.datamodules.tokenization.control_tokens import THOUGHT_END, unescape
from gatera_lightning.errors import AdapterFileError, ConfigError

_LONGEST = 2048
"""Tokens of a row for a backbone whose config has no limit."""

_PLACE = ("gold", "task", "key")
"""What ``test`` knows a row by."""


@dataclass(frozen=True)
class LocalModel:
    """Which model is evaluated.

    Attributes:
        backbone: Settings that load its backbone.
        adapter_folder: Its adapter; None for the backbone alone.
    """

    backbone: BackboneConfig
    adapter_folder: str | None

    @classmethod
    def of(cls, adapter: str | None, backbone: str | None, dtype: str = "auto") -> "LocalModel":
        """Find the backbone of an adapter, or take the one that is given.

        Args:
            adapter: An adapter folder; None for a backbone alone.
            backbone: A backbone without an adapter.
            dtype: Dtype of the backbone.

        Raises:
            ConfigError: Both or none of them are given.
            AdapterFileError: The adapter folder cannot be read, or does not store its backbone.
        """
        if (adapter is None) == (backbone is None):
            raise ConfigError(
                "adapter, backbone: give one of them; accepted: an adapter folder, or a backbone"
            )
        if adapter is None:
            return cls(BackboneConfig(id=str(backbone), dtype=cast(Dtype, dtype)), None)
        config, origin = read_adapter_config(adapter)
        if problem := missing_mask_problem(config):
            raise ConfigError(f"--adapter: {adapter}: {problem}")
        if origin["id"] is None:
            raise AdapterFileError(f"{adapter} does not store the id of its backbone")
        return cls(stored_backbone(origin, cast(Dtype, dtype)), adapter)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, which is loaded once for all tasks."""
        return _tokenizer(*astuple(self.backbone))

    def template(self, given: str | None) -> Template:
        """Return the prompt template: the given one, else that of the adapter's training, else chat or plain.

        Raises:
            ConfigError: It is ``chat``, and the tokenizer has no chat template.
        """
        has_chat_template = bool(self.tokenizer.chat_template)
        if given == "chat" and not has_chat_template:
            raise ConfigError(
                "--template: chat needs a tokenizer with a chat template, and this one has none; accepted: "
                "plain, alpaca"
            )
        if given is None and self.adapter_folder is not None:
            given = trained_template(self.adapter_folder)
        return cast(Template, given or ("chat" if has_chat_template else "plain"))

    def longest(self, given: int | None) -> int:
        """Return the maximum number of tokens of a row: the given one, else the model's context."""
        if given is not None:
            return given
        if gguf_file(self.backbone.id) is not None:  # its limit is known once the model is loaded
            return _LONGEST
        return context_length(load_config(self.backbone)) or _LONGEST


@lru_cache(maxsize=1)
def _tokenizer(*backbone: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneConfig(*backbone))


def commonsense(
    *,
    task: str,
    adapter: str | None = None,
    backbone: str | None = None,
    template: str | None = None,
    data_dir: str | None = None,
    answer_format: AnswerFormat = "label",
    max_length: int | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """Return the test split of a task in LLM-Adapters' schema, as lm-eval's ``custom_dataset``.

    Args:
        task: Name of the task, a folder in ``data_dir``.
        adapter: The adapter folder that is evaluated.
        backbone: The backbone that is evaluated, if there is no adapter.
        template: The prompt template; None takes the adapter's.
        data_dir: Folder with ``TASK/test.json``.
        answer_format: ``label`` or ``content``.
        max_length: Maximum number of tokens of a row; None takes the model's context.
        _: Other arguments of the model.

    Returns:
        ``test`` -> rows with the texts ``prompt`` and ``choices``, their token ids, and ``gold``.

    Raises:
        ConfigError: The data cannot be read; the message names the file and the row.
    """
    if data_dir is None and task not in CommonsenseDataModule.sample_tasks:
        raise ConfigError(f"--data_dir: is not set; accepted: a folder with {task}/test.json")
    model = LocalModel.of(adapter, backbone)
    data = CommonsenseDataModule(
        template=model.template(template),
        answer_format=answer_format,
        train_on="response",  # required, but nothing is trained
        data_dir=data_dir or "samples",
        test=[task],
        max_length=model.longest(max_length),
    )
    return {"test": rows_to_rank(data, model.tokenizer)}


def math_problems(
    *,
    task: str,
    adapter: str | None = None,
    backbone: str | None = None,
    template: str | None = None,
    data_dir: str | None = None,
    max_length: int | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """Return the word problems of a task's test split, as lm-eval's ``custom_dataset``.

    Args:
        task: Name of the task, a folder in ``data_dir``.
        adapter: The adapter folder that is evaluated.
        backbone: The backbone that is evaluated, if there is no adapter.
        template: The prompt template; None takes the adapter's.
        data_dir: Folder with ``TASK/test.json``.
        max_length: Maximum number of tokens of a row; None takes the model's context.
        _: Other arguments of the model.

    Returns:
        ``test`` -> rows with the text ``prompt``, its token ids, and the correct ``answer``.

    Raises:
        ConfigError: The data cannot be read; the message names the file and the row.
    """
    if data_dir is None and task not in MathDataModule.sample_tasks:
        raise ConfigError(f"--data_dir: is not set; accepted: a folder with {task}/test.json")
    model = LocalModel.of(adapter, backbone)
    data = MathDataModule(
        template=model.template(template),
        answer_style="gsm8k",  # of solutions, which are not read here
        train_on="response",  # required, but nothing is trained
        data_dir=data_dir or "samples",
        test=[task],
        evaluate_by=["generation"],
        max_length=model.longest(max_length),
    )
    return {"test": rows_to_answer(data, model.tokenizer)}


def judged_solution(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the final answer of a generated solution is correct, as ``test`` judges it.

    Args:
        doc: A row of :func:`math_problems`.
        results: The generated text.
    """
    return {"exact_match": float(parse_solution(results[0], doc["answer"]).choice == 0)}


def rows_to_rank(data: TaskDataModule, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a test split whose candidates are ranked.

    Args:
        data: The data module of a task.
        tokenizer: The tokenizer of the model.

    Returns:
        Rows with the texts ``prompt`` and ``choices``, their token ids, and ``gold``.
    """
    data.connect(tokenizer)
    data.setup("test")
    table = data.tables["test"].select_columns(["prompt", "answers", *_PLACE])
    return Dataset.from_list(
        [
            {
                "prompt": unescape(example.prompt),
                "choices": [_text(answer) for answer in example.answers],
                "prompt_ids": row["prompt"],
                "answer_ids": row["answers"],
                **{name: row[name] for name in _PLACE},
            }
            for example, row in zip(data.examples("test"), table, strict=True)
        ]
    )


def rows_to_answer(data: TaskDataModule, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a test split whose answers are generated.

    Args:
        data: The data module of a task.
        tokenizer: The tokenizer of the model.

    Returns:
        Rows with the text ``prompt``, its token ids, and the correct ``answer``.
    """
    data.connect(tokenizer)
    data.setup("test")
    table = data.tables["test"].select_columns(["prompt", "labels", *_PLACE])
    return Dataset.from_list(
        [
            {
                "prompt": unescape(example.prompt),
                "prompt_ids": row["prompt"],
                "answer": row["labels"][row["gold"]],
                "free_text": data.free_text,
                **{name: row[name] for name in _PLACE},
            }
            for example, row in zip(data.examples("test"), table, strict=True)
        ]
    )


def _text(answer: str) -> str:
    """The text of an answer, whose characters ``acc_norm`` counts as ``likelihood, per character`` does."""
    return unescape(answer).strip().removeprefix(THOUGHT_END).strip()
