"""Token tables: the examples of a split, tokenised once and cached on disk."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.templates import turn_end
from gatera_lightning.datamodules.tokenization.tokenize import Example, token_ranges, tokenise
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

_CACHE_VERSION = 4
"""Raise it when tokenisation changes, so that no table of an older version is read."""

_COLUMNS = datasets.Features(
    {
        "prompt": datasets.List(datasets.Value("int32")),  # token ids
        "earlier": datasets.List(
            datasets.List(datasets.Value("int32"))
        ),  # token ranges of earlier responses in the prompt
        "answers": datasets.List(
            datasets.List(datasets.Value("int32"))
        ),  # token ids of each candidate, EOS included
        "lengths": datasets.List(datasets.Value("int32")),  # tokens of the prompt with each candidate
        "characters": datasets.List(datasets.Value("int32")),  # of each candidate's text
        "labels": datasets.List(
            datasets.Value("string")
        ),  # what each candidate is recognised by in generated text
        "gold": datasets.Value("int32"),
        "task": datasets.Value("string"),
        "example": datasets.Value("int32"),  # row number within the split
        "key": datasets.Value("string"),  # Example.key
        "group": datasets.Value("string"),  # Example.group
        "shortened": datasets.Value("bool"),
    }
)


def token_table(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
) -> Dataset:
    """One row per example with the columns above, read from the cache where the same rows were tokenised before.

    Raises ConfigError when there is no example, or when an answer leaves no room for its prompt.
    """
    rows = [
        {**asdict(example), "key": example.key, "example": number} for number, example in enumerate(examples)
    ]
    if not rows:
        raise ConfigError(f"data.{split}: the split is empty; give at least one row")
    closing = turn_end(tokenizer) if any(row["chat"] for row in rows) else ""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        special, ends = not row["chat"], closing if row["chat"] else ""
        try:
            prompt, answers, shortened = tokenise(
                tokenizer, row["prompt"], row["answers"], max_length, special_tokens=special, turn_end=ends
            )
            earlier = row["earlier"] and token_ranges(
                tokenizer, row["prompt"], row["earlier"], prompt, special_tokens=special
            )
        except ValueError as error:
            raise ConfigError(
                f"data.{split}, example {row['example']} ({row['prompt'][:60]!r}…): {error}"
            ) from error
        return {
            "prompt": prompt,
            "earlier": earlier,
            "answers": answers,
            "lengths": [len(prompt) + len(answer) for answer in answers],
            "characters": [len(answer.strip()) for answer in row["answers"]],
            "labels": list(row["labels"] or row["answers"]),
            "shortened": shortened or row["shortened"],
        }

    inputs = [_CACHE_VERSION, rows, max_length, closing, _identity(tokenizer)]
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
        desc=f"tokenising {split}",
    )
    shortened = sum(table["shortened"])
    if shortened:
        log.warning(
            "%s: %d of %d prompts lost their beginning to max_length %d",
            split,
            shortened,
            len(table),
            max_length,
        )
    return table


def data_hash(table: Dataset) -> str:
    """16 hex digits of what a model sees of a table: token ids, right answers, tasks, in order."""
    digest = hashlib.sha256()
    for row in table.select_columns(["prompt", "answers", "gold", "task", "key"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, as text: vocabulary, merges, pre-tokenizer and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((whole + repr(tokenizer.special_tokens_map)).encode()).hexdigest()
