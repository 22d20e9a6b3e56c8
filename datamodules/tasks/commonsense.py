"""Commonsense multiple choice in the LLM-Adapters schema (Hu et al., EMNLP 2023, arXiv 2304.01933).

A row is ``{"instruction", "input", "output", "answer"}``. Its instruction holds the question, the options and a last
line ``Answer format: answer1/answer2/…``; its output is ``the correct answer is answer3``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gatera_lightning.datamodules.answers.options import Reading, first_keyword
from gatera_lightning.datamodules.base import unknown
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.datamodules.tasks.base import TaskFamily

AnswerFormat = Literal["label", "content"]

TASKS = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
    "everyday",
)
"""The eight published tasks by their LLM-Adapters folder names, and the embedded sample task."""

_FIELDS = ("instruction", "answer")
_LEAD_IN = re.compile(r"^Please (?:choose|answer)[^:]*:\s*")


@dataclass(frozen=True)
class Question:
    """One row, parsed: options by label and text, and which of them is right."""

    question: str
    labels: tuple[str, ...]
    options: tuple[str, ...]
    gold: int


def parse_question(row: dict[str, Any]) -> Question:
    """Split an LLM-Adapters row into question, options and gold.

    >>> parse_question({"instruction": "Please choose the correct answer to the question: Where is milk kept?\\n\\n"
    ...     "Answer1: fridge Answer2: shed\\n\\nAnswer format: answer1/answer2", "answer": "answer1"}).options
    ('fridge', 'shed')

    Raises ValueError, saying what was expected, when the options or the gold cannot be read.
    """
    head, labels, gold = _labels_and_gold(row)
    if labels == ("true", "false"):
        return Question(_LEAD_IN.sub("", head).strip(), labels, labels, gold)

    starts = []
    position = head.rfind(f"{labels[0].capitalize()}:")
    for label in labels:
        name = f"{label.capitalize()}:"
        position = head.find(name, position) if position >= 0 else -1
        if position < 0:
            raise ValueError(
                f"field 'instruction': expected an option '{name} …' for each of {'/'.join(labels)}"
            )
        starts.append((position, position + len(name)))
        position += len(name)
    ends = [start for start, _ in starts[1:]] + [len(head)]
    options = tuple(head[begin:end].strip() for (_, begin), end in zip(starts, ends, strict=True))
    if not all(options):
        raise ValueError("field 'instruction': an option has no text")
    return Question(_LEAD_IN.sub("", head[: starts[0][0]]).strip(), labels, options, gold)


def _labels_and_gold(row: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    """What stands before the answer format, the labels it lists, and which of them is the answer."""
    head, marker, listed = row["instruction"].rpartition("Answer format:")
    labels = tuple(listed.strip().split("/"))
    if not marker or len(labels) < 2:
        raise ValueError("field 'instruction': expected a last line 'Answer format: label1/label2/…'")
    if row["answer"] not in labels:
        raise ValueError(f"field 'answer': {row['answer']!r} is not among the options {'/'.join(labels)}")
    return head, labels, labels.index(row["answer"])


class CommonsenseDataModule(TaskFamily):
    """Multiple choice by ``label`` ("the correct answer is answer3", the published protocol) or by ``content``."""

    tasks = TASKS
    sample_tasks = ("everyday",)

    def __init__(self, *, answer_format: AnswerFormat | None = None, **family: Any) -> None:
        """Multiple-choice data in the LLM-Adapters schema.

        Args:
            answer_format: label trains and scores "the correct answer is answer3"; content the option's own text,
                with the options left out of the prompt.
            family: Template, sources and what else every family can be told: see :class:`TaskFamily`.
        """
        super().__init__(**family)
        self.answer_format = answer_format

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work, missing files included; reads no rows."""
        found = super().problems(stage)
        if self.answer_format not in get_args(AnswerFormat):
            found.append(unknown("answer_format", self.answer_format, get_args(AnswerFormat)))
        return found

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Prompt and candidate answers of a row."""
        for field in _FIELDS:
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(
                    f"field {field!r} is missing or not a text; a row needs {', '.join(_FIELDS)}"
                )
        if row.get("input"):
            raise ValueError(
                f"field 'input' is {row['input']!r:.60}; expected nothing: the question is in 'instruction'"
            )
        if self.answer_format == "content":
            question = parse_question(row)
            request, answers, labels, gold = (
                question.question,
                question.options,
                question.options,
                question.gold,
            )
        elif self.answer_format == "label":  # the options' texts stay in the instruction and need not be read
            _, labels, gold = _labels_and_gold(row)
            request, answers = row["instruction"], tuple(f"the correct answer is {label}" for label in labels)
        else:
            raise ValueError(unknown("answer_format", self.answer_format, get_args(AnswerFormat)))
        prompt, texts = render(self.template, request, answers, self.tokenizer)
        identity, chat = row["instruction"], self.template == "chat"
        return Example(prompt, texts, gold, task, labels=labels, identity=identity, chat=chat)

    def read_answer(self, text: str, labels: Sequence[str]) -> Reading:
        """label: the first answer keyword, as published; content: the option whose text the first line is."""
        if self.answer_format == "content":
            return super().read_answer(text, labels)
        choice = first_keyword(text, labels)
        return Reading(None if choice is None else labels[choice], choice)
