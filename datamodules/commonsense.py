"""Commonsense multiple choice in the LLM-Adapters schema (Hu et al., EMNLP 2023, arXiv 2304.01933).

A row is ``{"instruction", "input", "output", "answer"}``. Its instruction holds the question, the options and a last
line ``Answer format: answer1/answer2/…``; its output is ``the correct answer is answer3``.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.prompts import Template, render
from gatera_lightning.datamodules.tokens import Example, TrainOn
from gatera_lightning.errors import ConfigError

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
_SLICE = re.compile(r"^(?P<name>.*?)(?:\[:(?P<rows>\d+)\])?$")


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
            raise ValueError(f"field 'instruction': expected an option '{name} …' for each of {'/'.join(labels)}")
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


class CommonsenseDataModule(SupervisedDataModule):
    """Multiple choice by ``label`` ("the correct answer is answer3", the published protocol) or by ``content``."""

    def __init__(
        self,
        *,
        template: Template,
        answer_format: AnswerFormat,
        train_on: TrainOn,
        train: list[str] | None = None,
        validation: list[str] | int | None = None,
        test: list[str] | None = None,
        data_dir: str = "samples",
        max_length: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 16,
        token_budget: int | None = None,
        group_by_length: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Multiple-choice data in the LLM-Adapters schema.

        A source is a task name (``ARC-Easy``: the file ``data_dir/ARC-Easy/<split>.json``), a path to a ``.json`` or
        ``.jsonl`` file, or a hub id (``zwhe99/commonsense_170k``); ``[:2000]`` after it takes the first 2,000 rows.

        Args:
            template: alpaca or plain.
            answer_format: label trains and scores "the correct answer is answer3"; content the option's own text,
                with the options left out of the prompt.
            train_on: response computes the loss on the answer only, all on the prompt as well.
            train: Sources of the training split; default: the embedded sample task. A source with a slice is quoted in
                YAML lists: ``["openbookqa[:2000]"]``.
            validation: Sources of the validation split, or a number of rows held out of training.
            test: Sources of the test split.
            data_dir: Folder with one folder per task; samples means the embedded rows. $VARIABLES are expanded.
            max_length: Tokens of prompt and answer together; a longer prompt loses its beginning, never its answer.
            batch_size: Rows in one optimizer step, over all micro-batches and processes.
            eval_batch_size: Sequences in one evaluation forward, per process.
            token_budget: Close a step before it holds more real tokens than this; null for no limit.
            group_by_length: Form steps from rows of similar length, so that less padding is computed.
            num_workers: Loader processes.
            seed: Seed of the plan (which rows form a step) and of the order of the steps.
        """
        super().__init__(
            train_on=train_on,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            token_budget=token_budget,
            group_by_length=group_by_length,
            num_workers=num_workers,
            seed=seed,
            held_out_rows=validation if isinstance(validation, int) else None,
        )
        self.template = template
        self.answer_format = answer_format
        self.data_dir = data_dir
        default = ["everyday"] if data_dir == "samples" else []
        self.sources = {
            "train": train if train is not None else default,
            "validation": validation if isinstance(validation, list) else default,
            "test": test if test is not None else default,
        }

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work, missing files included; reads no rows."""
        found = super().problems(stage)
        for name, accepted in (("template", Template), ("answer_format", AnswerFormat)):
            if getattr(self, name) not in get_args(accepted):
                value = getattr(self, name)
                found.append(f"data.{name}: {value!r} is unknown; accepted: {', '.join(get_args(accepted))}")
        for split in self.splits(stage):
            if not self.sources[split]:
                also = ", or a number of rows to hold out of training" if split == "validation" else ""
                found.append(f"data.{split}: no source given; accepted: a list of task names, files or hub ids{also}")
            for source in self.sources[split]:
                found += [f"data.{split}: {text}" for text in self._source_problems(source, split)]
        return found

    def examples(self, split: str) -> Iterator[Example]:
        """Prompt and candidate answers of every row of a split."""
        for source in self.sources[split]:
            for where, row in self._rows(source, split):
                try:
                    if self.answer_format == "content":
                        question = parse_question(row)
                        request, answers, gold = question.question, question.options, question.gold
                    else:  # the options' texts stay in the instruction and need not be read
                        _, labels, gold = _labels_and_gold(row)
                        request, answers = row["instruction"], tuple(f"the correct answer is {label}" for label in labels)
                except ValueError as error:
                    raise ConfigError(f"{where}: {error}") from error
                rendered = [render(self.template, request, answer) for answer in answers]
                yield Example(rendered[0][0], [answer for _, answer in rendered], gold, _task_name(source))

    def _file(self, name: str, split: str) -> Path | None:
        """The local file of a source, or None for a hub id."""
        local = os.path.expanduser(os.path.expandvars(name))
        if local.endswith((".json", ".jsonl")):
            return Path(local)
        if "/" in local:
            return None
        if self.data_dir == "samples":
            return Path(str(resources.files("gatera_lightning.datamodules") / "samples")) / name / f"{split}.json"
        return Path(os.path.expanduser(os.path.expandvars(self.data_dir))) / name / f"{split}.json"

    def _source_problems(self, source: str, split: str) -> list[str]:
        name = _SLICE.match(source)["name"]  # type: ignore[index]
        path = self._file(name, split)
        if path is None or path.is_file():
            return []
        if name in TASKS:
            there = ", ".join(sorted(p.name for p in path.parent.parent.glob("*") if p.is_dir())) or "no task folders"
            return [f"task {name!r} needs the file {path}, which does not exist; {path.parent.parent} holds {there}"]
        if name.endswith((".json", ".jsonl")):
            return [f"the file {path} does not exist"]
        return [f"task {name!r} is unknown; accepted: {', '.join(TASKS)}, a .json or .jsonl file, or a hub id (owner/name)"]

    def _rows(self, source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row of a source with the words that say where it stands."""
        match = _SLICE.match(source)
        assert match is not None  # the pattern matches every string
        name, limit = match["name"], match["rows"]
        path = self._file(name, split)
        rows = hub_rows(name, split) if path is None else file_rows(path)
        for number, (where, row) in enumerate(rows):
            if limit is not None and number >= int(limit):
                return
            for field in _FIELDS:
                if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                    raise ConfigError(f"{where}: field {field!r} is missing or not a text; a row needs {', '.join(_FIELDS)}")
            if row.get("input"):
                raise ConfigError(
                    f"{where}: field 'input' is {row['input']!r:.60}; expected nothing: the question is in 'instruction'"
                )
            yield where, row


def _task_name(source: str) -> str:
    """What a source is called in results: the task, the file's own name, or its folder's where that is just a split's."""
    path = Path(_SLICE.match(source)["name"])  # type: ignore[index]
    return path.parent.name if path.stem in ("train", "validation", "test") and path.parent.name else path.stem


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON list or of JSON lines, each with ``file, row N`` (from 1). Raises ConfigError when malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}, row {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path}, row {number}: not JSON ({error.msg}, column {error.colno})") from error
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: expected a JSON list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a hub data set, with ``name[split], row N``. Raises ConfigError when it cannot be fetched."""
    from datasets import load_dataset

    try:
        table = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types; all of them mean "not to be had"
        raise ConfigError(
            f"data.{split}: cannot fetch {name!r} from the hub ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Without network, give local .json files or a data_dir."
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{name}[{split}], row {number}", row
