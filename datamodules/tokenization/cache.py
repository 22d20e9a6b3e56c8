"""Token tables: the examples of a split, tokenized once and cached on disk."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.chat_template import answer_suffix
from gatera_lightning.datamodules.tokenization.control_tokens import (
    THOUGHT_END,
    control_tokens,
    unescape,
)
from gatera_lightning.datamodules.tokenization.tokenize import token_ranges, tokenize_example
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

_CACHE_VERSION = 6
"""Increase it when tokenization or the columns change, so that tables of earlier versions are not read."""

_INTEGERS = datasets.List(datasets.Value("int32"))

_COLUMNS = datasets.Features(
    {
        "prompt": _INTEGERS,  # token ids
        "earlier_responses": datasets.List(_INTEGERS),  # token ranges (start, end) in the prompt
        "answers": datasets.List(_INTEGERS),  # token ids of each candidate, EOS included
        "lengths": _INTEGERS,  # tokens of the prompt with each candidate
        "characters": _INTEGERS,  # characters of each candidate's text
        "labels": datasets.List(datasets.Value("string")),  # Example.labels, filled in
        "gold": datasets.Value("int32"),
        "task": datasets.Value("string"),
        "example": datasets.Value("int32"),  # index within the split
        "key": datasets.Value("string"),  # Example.key
        "request_key": datasets.Value("string"),  # Example.request_key
        "group": datasets.Value("string"),  # Example.group
        "truncated": datasets.Value("bool"),
    }
)


def tokenize_split(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
) -> Dataset:
    """Return the token table of a split: tokenized now, or read from the cache if nothing has changed.

    The cache is in ``$HF_DATASETS_CACHE/gatera_lightning``. Its key covers the examples, the tokenizer and
    ``max_length``.

    Args:
        examples: The examples of the split, in order.
        tokenizer: The backbone's tokenizer.
        max_length: Maximum number of tokens of prompt and answer together.
        split: Name of the split in messages.

    Raises:
        ConfigError: The split is empty, or an answer leaves no room for its prompt.
    """
    rows, places = [], []
    for number, example in enumerate(examples):
        fields = asdict(example)
        places.append(fields.pop("place"))  # a table does not depend on where its files are
        rows.append(fields | {"key": example.key, "request_key": example.request_key, "example": number})
    if not rows:
        raise ConfigError(f"data.{split}: the split is empty; give at least one example")
    try:
        closing = answer_suffix(tokenizer) if any(row["chat"] for row in rows) else ""
    except ValueError as error:
        raise ConfigError(f"data.template: chat: {error}") from error

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        special, end = not row["chat"], closing if row["chat"] else ""
        try:
            prompt_ids, answer_ids, truncated = tokenize_example(
                tokenizer,
                row["prompt"],
                row["answers"],
                max_length,
                special_tokens=special,
                answer_suffix=end,
            )
            earlier_responses = row["earlier_responses"] and token_ranges(
                tokenizer, row["prompt"], row["earlier_responses"], prompt_ids, special_tokens=special
            )
        except ValueError as error:
            place = places[row["example"]]
            raise ConfigError(
                f"{place}{': ' if place else ''}data.{split}, example {row['example']} "
                f"({unescape(row['prompt'])[:60]!r}…): {error}"
            ) from error
        return {
            "prompt": prompt_ids,
            "earlier_responses": earlier_responses,
            "answers": answer_ids,
            "lengths": [len(prompt_ids) + len(ids) for ids in answer_ids],
            "characters": [_count_characters(answer) for answer in row["answers"]],
            "labels": list(row["labels"] or map(unescape, row["answers"])),
            "truncated": truncated or row["truncated"],
        }

    inputs = [_CACHE_VERSION, rows, max_length, closing, _tokenizer_digest(tokenizer)]
    cache_key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "gatera_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    source = Dataset.from_list(rows)
    table = source.map(
        encode,
        features=_COLUMNS,
        remove_columns=[name for name in source.column_names if name not in _COLUMNS],
        new_fingerprint=cache_key,
        cache_file_name=str(folder / f"{cache_key}.arrow"),
        desc=f"Tokenizing {split}",
    )
    if truncated := sum(table["truncated"]):
        log.warning(
            "%s: %d of %d prompts were truncated to fit max_length %d",
            split,
            truncated,
            len(table),
            max_length,
        )
    return table


def data_hash(table: Dataset) -> str:
    """Return 16 hex digits of what a model is tested on: token ids, correct answers and tasks, in order."""
    digest = hashlib.sha256()
    for row in table.select_columns(["prompt", "answers", "gold", "task", "key"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _count_characters(answer: str) -> int:
    """Characters of an answer, without the end of the empty thought that a chat template opens."""
    return len(unescape(answer).strip().removeprefix(THOUGHT_END).strip())


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that token ids depend on, besides the texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: list[Any] = [
        type(tokenizer).__qualname__,
        tokenizers.__version__,
        tokenizer.special_tokens_map,
        bool(tokenizer.split_special_tokens),
        control_tokens(tokenizer).tokens,
    ]
    if backend is not None:  # vocabulary, merges, normalizer, pre-tokenizer, post-processor and added tokens
        fast = json.loads(backend.to_str())
        state.append({name: part for name, part in fast.items() if name not in ("truncation", "padding")})
    else:
        state += [sorted(tokenizer.get_vocab().items()), repr(tokenizer.added_tokens_decoder)]
        state.append({k: v for k, v in tokenizer.init_kwargs.items() if isinstance(v, bool | int | float)})
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()
