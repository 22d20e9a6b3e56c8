"""Word problems whose answer is a number or an option's letter: MetaMathQA, GSM8K and the test sets of LLM-Adapters.

A row's fields tell its schema: ``query, response`` is MetaMathQA's (Yu et al., ICLR 2024, arXiv 2309.12284), ``question,
answer`` GSM8K's (Cobbe et al., 2021, arXiv 2110.14168), ``instruction, input, output, answer`` that of LLM-Adapters (Hu et
al., EMNLP 2023, arXiv 2304.01933). The ``output`` of the last is a machine's rationale and often wrong; it is never read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gatera_lightning.datamodules.answers.numbers import final_answer, number, option_letter, same_number
from gatera_lightning.datamodules.answers.options import Reading
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.datamodules.tasks.base import TaskFamily, UnusableRow

AnswerStyle = Literal["gsm8k", "metamath"]

TASKS = ("gsm8k", "SVAMP", "AddSub", "MultiArith", "SingleEq", "AQuA", "mawps", "arithmetic")
"""The published sets by their LLM-Adapters folder names, and the embedded sample task."""

LETTERS = "ABCDE"
"""The options of AQuA."""

_MARKS: dict[AnswerStyle, str] = {"gsm8k": "####", "metamath": "The answer is:"}
_FIELDS = {
    "query": "response",
    "question": "answer",
    "instruction": "answer",
}  # a schema's question, and where its gold is
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_LAST_MARK = re.compile(r"\s*####[^\n]*\s*\Z")


@dataclass(frozen=True)
class Problem:
    """One row, parsed: the question, the solution up to where its final answer is named, and the answer."""

    question: str
    solution: str
    answer: str

    def response(self, style: AnswerStyle) -> str:
        """Solution and answer as one text, ending in ``#### 72`` (gsm8k) or ``The answer is: 72`` (metamath)."""
        if (
            style == "metamath"
        ):  # what MetaMath itself wrote stays as it is, with the #### that some of it has
            return f"{self.solution}{_MARKS[style]} {self.answer}"
        return f"{_LAST_MARK.sub('', self.solution).rstrip()}\n{_MARKS[style]} {self.answer}".lstrip()


def parse_problem(row: dict[str, Any], *, keep_annotations: bool = False) -> Problem:
    """Split a row of any of the three schemas; the answer may turn out empty, or not be a number.

    >>> parse_problem({"question": "What is 48/2?", "answer": "It is <<48/2=24>>24.\\n#### 24"})
    Problem(question='What is 48/2?', solution='It is 24.\\n', answer='24')

    Raises ValueError, saying what was expected, for a row of no such schema.
    """
    field = next((field for field in _FIELDS if field in row), None) if isinstance(row, dict) else None
    if field is None:
        accepted = "; ".join(f"{asked}, {told}" for asked, told in _FIELDS.items())
        raise ValueError(f"field 'question' is missing; a row needs one of these pairs of fields: {accepted}")
    question, text = row[field], row.get(_FIELDS[field])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"field {field!r} is not a text")
    if row.get("input"):
        raise ValueError(
            f"field 'input' is {row['input']!r:.60}; expected nothing: the question is in {field!r}"
        )
    text = str(text) if isinstance(text, str | int | float) else ""
    mark = _MARKS["metamath" if field == "query" else "gsm8k"]
    solution, found, answer = text.rpartition(mark)
    if field == "query" and not found:
        answer = ""
    if field == "question" and not keep_annotations:
        solution = _ANNOTATION.sub("", solution)
    return Problem(question.strip(), solution.lstrip(), answer.strip())


class MathDataModule(TaskFamily):
    """Word problems: trained on worked solutions where there are any, judged by the value of the final answer."""

    tasks = TASKS
    sample_tasks = ("arithmetic",)

    def __init__(self, *, answer_style: AnswerStyle, keep_annotations: bool = False, **family: Any) -> None:
        """Word problems of MetaMathQA, GSM8K and LLM-Adapters.

        Args:
            answer_style: How a solution ends that is trained on: gsm8k ("#### 72") or metamath ("The answer is: 72").
            keep_annotations: Keep GSM8K's calculator annotations (<<48/2=24>>) in the solutions.
            family: Template, sources and what else every family can be told: see :class:`TaskFamily`.
        """
        super().__init__(**family)
        self.answer_style = answer_style
        self.keep_annotations = keep_annotations

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work, missing files included; reads no rows."""
        found = super().problems(stage)
        if self.answer_style not in get_args(AnswerStyle):
            accepted = ", ".join(get_args(AnswerStyle))
            found.append(f"data.answer_style: {self.answer_style!r} is unknown; accepted: {accepted}")
        if self.rank_validation:
            found.append(
                "data.rank_validation: true, and a math row has one candidate, which always ranks first; accepted: false"
            )
        return found

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Prompt and solution of a row; its one label is the gold. Raises UnusableRow without a gold to judge by.

        A MetaMath solution that ends in an expression (``x + 1``) can be trained on all the same.
        """
        problem = parse_problem(row, keep_annotations=self.keep_annotations)
        value = number(problem.answer)
        if value is not None and not problem.solution:  # "8.0" is how the sets of LLM-Adapters print 8
            problem = Problem(problem.question, "", str(value) if value.denominator == 1 else problem.answer)
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
            field = next(told for asked, told in _FIELDS.items() if asked in row)
            reason = f"field {field!r}: expected a number or a letter of {LETTERS} at its end, found {problem.answer!r:.60}"
            raise UnusableRow(reason, trains=example if "query" in row and problem.answer else None)
        return example

    def read_answer(self, text: str, labels: Sequence[str]) -> Reading:
        """The final answer of a generated solution, and 0 where it is the gold (``labels[0]``), by value or by letter.

        Raises ValueError for a gold that is neither a number nor a letter.
        """
        gold = number(labels[0])
        if gold is None:
            if not _is_letter(labels[0]):
                raise ValueError(f"label {labels[0]!r}: expected a number or a letter of {LETTERS}")
            letter = option_letter(text, LETTERS)
            return Reading(letter, 0 if letter == labels[0] else None)
        answer = final_answer(text)
        value = None if answer is None else number(answer)
        return Reading(answer, 0 if value is not None and same_number(value, gold) else None)


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and answer in LETTERS
