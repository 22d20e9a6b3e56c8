"""Prompts of three families that no draft adapter of the recipes was trained on."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules import (
    CommonsenseDataModule,
    DialogueDataModule,
    MathDataModule,
    TaskDataModule,
)

FAMILIES = ("math", "dialogue", "quickstart")
"""Questions of GSM8K's test split; ConvAI2's held-out dialogues; test questions of the embedded sample."""


def held_out_prompts(family: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Return the token ids of prompts in the template `plain`.

    Args:
        family: One of :data:`FAMILIES`.
        tokenizer: The model's tokenizer.
        count: How many prompts.

    Raises:
        ValueError: The family has fewer prompts.
    """
    data = _data(family, count)
    data.connect(tokenizer)
    data.setup("test")
    prompts: dict[str, list[int]] = {}
    for row in data.tables["test"]:
        prompts.setdefault(row["group"] or row["key"], row["prompt"])  # the first turn of each dialogue
    if len(prompts) < count:
        raise ValueError(f"--questions: {count}; accepted for {family}: at most {len(prompts)}")
    return list(prompts.values())[:count]


def _data(family: str, count: int) -> TaskDataModule:
    common: dict[str, Any] = {
        "template": "plain",
        "train_on": "response",
        "evaluate_by": ["generation"],
        "max_length": 1024,  # no prompt is cut
    }
    if family == "quickstart":
        return CommonsenseDataModule(**common, answer_format="content", test=["everyday"])
    root = Path(os.environ["GATERA_DATA"])
    if family == "math":
        folder = str(root / "math")
        return MathDataModule(**common, answer_style="gsm8k", data_dir=folder, test=[f"gsm8k[:{count}]"])
    # Training uses the first 61 dialogues, which share no persona with the others.
    source = root / "dialogue" / "convai2" / "valid_self_original.shared.txt"
    return DialogueDataModule(**common, max_history_turns=0, test=[f"{source}[61:{61 + count}]"])
