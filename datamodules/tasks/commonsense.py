"""Commonsense multiple choice in the schema of LLM-Adapters (Hu et al., EMNLP 2023, arXiv 2304.01933).

A row is ``{"instruction", "input", "output", "answer"}``. The instruction contains the question, the options
and a last line ``Answer format: answer1/answer2/…``; the output is ``the correct answer is answer3``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gatera_lightning.datamodules.answers.options import ParsedAnswer, find_keyword
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.datamodules.prompts.unread_columns import check_task_row
from gatera_lightning.datamodules.tasks.base import TaskDataModule
from gatera_lightning.errors import unknown_value

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
"""The eight published tasks, named after their folders in LLM-Adapters, and the sample task."""

_REQUIRED_FIELDS = ("instruction", "answer")
_LEAD_IN = re.compile(r"^Please (?:choose|answer)[^:]*:\s*")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    question: str

    labels: tuple[str, ...]
    """Labels of the options, such as ``answer1``."""

    options: tuple[str, ...]
    """Texts of the options."""

    gold: int
    """Index of the correct option."""


def parse_question(row: dict[str, Any]) -> Question:
    """Parse the question, the options and the correct one from a row of LLM-Adapters.

    >>> instruction = ("Please choose the correct answer to the question: Where is milk kept?\\n\\n"
    ...     "Answer1: fridge Answer2: shed\\n\\nAnswer format: answer1/answer2")
    >>> parse_question({"instruction": instruction, "answer": "answer1"}).options
    ('fridge', 'shed')

    Args:
        row: A row whose ``instruction`` and ``answer`` are texts.

    Raises:
        ValueError: The options or the correct answer cannot be parsed; the message says what was expected.
    """
    body, labels, gold = _split_answer_format(row)
    if labels == ("true", "false"):
        return Question(_LEAD_IN.sub("", body).strip(), labels, labels, gold)

    headings = []  # (start, end) of "Answer1:", "Answer2:", …
    position = body.rfind(f"{labels[0].capitalize()}:")
    for label in labels:
        heading = f"{label.capitalize()}:"
        position = body.find(heading, position) if position >= 0 else -1
        if position < 0:
            raise ValueError(
                f"field 'instruction': expected an option '{heading} …' for each of {'/'.join(labels)}"
            )
        headings.append((position, position + len(heading)))
        position += len(heading)
    ends = [start for start, _ in headings[1:]] + [len(body)]
    options = tuple(body[start:end].strip() for (_, start), end in zip(headings, ends, strict=True))
    if not all(options):
        raise ValueError("field 'instruction': an option has no text")
    return Question(_LEAD_IN.sub("", body[: headings[0][0]]).strip(), labels, options, gold)


def _split_answer_format(row: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    """The instruction without its answer format, the labels listed there, and the correct one's index."""
    body, marker, listed = row["instruction"].rpartition("Answer format:")
    labels = tuple(listed.strip().split("/"))
    if not marker or len(labels) < 2:
        raise ValueError("field 'instruction': expected a last line 'Answer format: label1/label2/…'")
    if row["answer"] not in labels:
        raise ValueError(f"field 'answer': {row['answer']!r} is not one of the options {'/'.join(labels)}")
    return body, labels, labels.index(row["answer"])


class CommonsenseDataModule(TaskDataModule):
    """Multiple-choice questions of LLM-Adapters."""

    tasks = TASKS
    sample_tasks = ("everyday",)

    def __init__(self, *, answer_format: AnswerFormat | None = None, **common: Any) -> None:
        """Set how an answer is written.

        Args:
            answer_format: label shows the options and answers "the correct answer is answer3", as in the
                published results; content hides the options and answers with the text of the correct one, so
                that a model that does not know the format can rank them too.
            common: Settings of :class:`TaskDataModule`.
        """
        super().__init__(**common)
        self.answer_format = answer_format

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings; see :meth:`TaskDataModule.problems`."""
        found = super().problems(stage)
        if self.answer_format not in get_args(AnswerFormat):
            found.append(unknown_value("data.answer_format", self.answer_format, get_args(AnswerFormat)))
        return found

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Build a question with all its options as candidates; see :meth:`TaskDataModule.example`."""
        for field in _REQUIRED_FIELDS:
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(
                    f"field {field!r} is missing, empty or not text; required: {', '.join(_REQUIRED_FIELDS)}"
                )
        if row.get("input"):
            raise ValueError(
                f"field 'input' is {row['input']!r:.60}; expected nothing: the question is in 'instruction'"
            )
        check_task_row(row)
        answers: Sequence[str]
        if self.answer_format == "content":
            question = parse_question(row)
            request, labels, gold = question.question, question.options, question.gold
            answers = labels
        elif self.answer_format == "label":  # the texts of the options are not needed, so they are not parsed
            _, labels, gold = _split_answer_format(row)
            request = row["instruction"]
            answers = [f"the correct answer is {label}" for label in labels]
        else:
            raise ValueError(unknown_value("data.answer_format", self.answer_format, get_args(AnswerFormat)))
        prompt, texts = render(self.template, request, answers, self.tokenizer)
        identity, chat = row["instruction"], self.template == "chat"
        return Example(prompt, texts, gold, task, labels=labels, identity=identity, chat=chat)

    def parse_answer(self, text: str, labels: Sequence[str]) -> ParsedAnswer:
        """Parse the first keyword (``label``), or the option whose text is the first line (``content``)."""
        if self.answer_format == "content":
            return super().parse_answer(text, labels)
        choice = find_keyword(text, labels)
        return ParsedAnswer(None if choice is None else labels[choice], choice)
