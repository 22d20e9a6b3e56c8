"""Word problems whose answer is a number or an option letter: MetaMathQA, GSM8K and the test sets of
LLM-Adapters.

The schema of a row is recognized by its fields: ``query, response`` is MetaMathQA (Yu et al., ICLR 2024,
arXiv 2309.12284), ``question, answer`` is GSM8K (Cobbe et al., 2021, arXiv 2110.14168), and ``instruction,
input, output, answer`` is LLM-Adapters (Hu et al., EMNLP 2023, arXiv 2304.01933), whose ``output`` is a
model's rationale, often wrong, and ignored.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gatera_lightning.datamodules.answers.numbers import (
    TOLERANCE,
    find_final_number,
    find_option_letter,
    numbers_equal,
    parse_number,
)
from gatera_lightning.datamodules.answers.options import ParsedAnswer
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.datamodules.prompts.unread_columns import check_task_row
from gatera_lightning.datamodules.settings import boolean_problems
from gatera_lightning.datamodules.tasks.base import TaskDataModule, UnusableRow
from gatera_lightning.errors import unknown_value

AnswerStyle = Literal["gsm8k", "metamath"]

TASKS = ("gsm8k", "SVAMP", "AddSub", "MultiArith", "SingleEq", "AQuA", "mawps", "arithmetic")
"""The published test sets, named after their folders in LLM-Adapters, and the sample task."""

LETTERS = "ABCDE"
"""Option letters of AQuA."""

_MARKERS: dict[AnswerStyle, str] = {"gsm8k": "####", "metamath": "The answer is:"}
_ANSWER_FIELDS = {"query": "response", "question": "answer", "instruction": "answer"}  # by question field
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FINAL_GSM8K_LINE = re.compile(r"\s*####[^\n]*\s*\Z")


@dataclass(frozen=True)
class Problem:
    """A word problem."""

    question: str

    solution: str
    """The worked solution up to the marker of its final answer; empty if there is none."""

    answer: str
    """The final answer as text; empty if there is none."""

    def response(self, style: AnswerStyle) -> str:
        """Return solution and answer, ending in ``#### 72`` (gsm8k) or ``The answer is: 72`` (metamath)."""
        if style == "metamath":  # keeps the "####" line that some solutions of MetaMathQA contain as well
            return f"{self.solution}{_MARKERS[style]} {self.answer}"
        steps = _FINAL_GSM8K_LINE.sub("", self.solution).rstrip()
        return f"{steps}\n{_MARKERS[style]} {self.answer}".lstrip()


def parse_problem(row: dict[str, Any], *, keep_annotations: bool = False) -> Problem:
    """Parse a row of any of the three schemas.

    >>> parse_problem({"question": "What is 48/2?", "answer": "It is <<48/2=24>>24.\\n#### 24"})
    Problem(question='What is 48/2?', solution='It is 24.\\n', answer='24')

    Args:
        row: A row of a dataset.
        keep_annotations: Whether to keep GSM8K's calculator annotations.

    Returns:
        The problem. Its answer may be empty, or not a number.

    Raises:
        ValueError: The row has none of the schemas; the message says what was expected.
    """
    field = next((field for field in _ANSWER_FIELDS if field in row), None) if isinstance(row, dict) else None
    if field is None:
        pairs = "; ".join(f"{question}, {answer}" for question, answer in _ANSWER_FIELDS.items())
        raise ValueError(f"field 'question' is missing; a row needs one of these pairs of fields: {pairs}")
    question, value = row[field], row.get(_ANSWER_FIELDS[field])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"field {field!r} is empty or not text")
    if row.get("input"):
        raise ValueError(
            f"field 'input' is {row['input']!r:.60}; expected nothing: the question is in {field!r}"
        )
    text = str(value) if isinstance(value, str | int | float) else ""
    solution, marker, answer = text.rpartition(_MARKERS["metamath" if field == "query" else "gsm8k"])
    if field == "query" and not marker:
        answer = ""
    if field == "question" and not keep_annotations:
        solution = _ANNOTATION.sub("", solution)
    return Problem(question.strip(), solution.lstrip(), answer.strip())


class MathDataModule(TaskDataModule):
    """Word problems, trained on worked solutions where available, and evaluated by their final answer."""

    answer_rule = f"numbers within {float(TOLERANCE):g}"
    tasks = TASKS
    sample_tasks = ("arithmetic",)

    def __init__(self, *, answer_style: AnswerStyle, keep_annotations: bool = False, **common: Any) -> None:
        """Set how a solution is written.

        Args:
            answer_style: How solutions end: gsm8k ("#### 72") or metamath ("The answer is: 72"). The style of
                the training data leaves its solutions as published, the other one rewrites their end.
                Generated answers are understood in both styles.
            keep_annotations: Keep GSM8K's calculator annotations (<<48/2=24>>). They cost tokens, and nothing
                here runs a calculator.
            common: Settings of :class:`TaskDataModule`.
        """
        super().__init__(**common)
        self.answer_style = answer_style
        self.keep_annotations = keep_annotations

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings; see :meth:`TaskDataModule.problems`."""
        found = super().problems(stage)
        if self.answer_style not in get_args(AnswerStyle):
            found.append(unknown_value("data.answer_style", self.answer_style, get_args(AnswerStyle)))
        found += boolean_problems("keep_annotations", self.keep_annotations)
        if self.rank_validation:
            found.append(
                "data.rank_validation: true, but a word problem has a single candidate, "
                "which always ranks first; accepted: false"
            )
        return found

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Build the prompt and the solution of a row; see :meth:`TaskDataModule.example`.

        A solution of MetaMathQA that ends in an expression (``x + 1``) is used for training only.
        """
        problem = parse_problem(row, keep_annotations=self.keep_annotations)
        check_task_row(row)
        value = parse_number(problem.answer)
        if value is not None and not problem.solution:  # LLM-Adapters writes 8 as "8.0"
            answer = str(value) if value.denominator == 1 else problem.answer
            problem = Problem(problem.question, "", answer)
        prompt, texts = render(
            self.template, problem.question, [problem.response(self.answer_style)], self.tokenizer
        )
        example = Example(
            prompt,
            texts,
            0,
            task,
            labels=[problem.answer],
            identity=problem.question,
            chat=self.template == "chat",
        )
        if value is None and not _is_letter(problem.answer):
            field = next(answer for question, answer in _ANSWER_FIELDS.items() if question in row)
            raise UnusableRow(
                f"field {field!r}: expected it to end in a number or a letter of {LETTERS}, "
                f"found {problem.answer!r:.60}",
                training_example=example if "query" in row and problem.answer else None,
            )
        return example

    def parse_answer(self, text: str, labels: Sequence[str]) -> ParsedAnswer:
        """Parse the final answer of a generated solution; see :func:`parse_solution`.

        Args:
            text: Generated text.
            labels: The correct answer, alone.
        """
        return parse_solution(text, labels[0])


def parse_solution(text: str, label: str) -> ParsedAnswer:
    """Parse the final answer of a generated solution, and compare it with the correct one.

    Numbers are equal within 0.001; letters must be the same.

    Args:
        text: Generated text.
        label: The correct answer.

    Returns:
        The answer as it is written; its choice is 0 if it is correct, otherwise None.

    Raises:
        ValueError: The label is neither a number nor a letter.
    """
    gold = parse_number(label)
    if gold is None:
        if not _is_letter(label):
            raise ValueError(f"label {label!r}: expected a number or a letter of {LETTERS}")
        letter = find_option_letter(text, LETTERS)
        return ParsedAnswer(letter, 0 if letter == label else None)
    answer = find_final_number(text)
    value = None if answer is None else parse_number(answer)
    return ParsedAnswer(answer, 0 if value is not None and numbers_equal(value, gold) else None)


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and answer in LETTERS
