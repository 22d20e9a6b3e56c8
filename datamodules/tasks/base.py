"""A task family: rows of named tasks, files, web addresses or hub data sets, each of which becomes an example."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, get_args

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.base import SupervisedDataModule, unknown
from gatera_lightning.datamodules.batching.mixture import weight_problems
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.sources.files import (
    ROW_SUFFIXES,
    SUFFIXES,
    file_rows,
    hub_rows,
    is_address,
    local_path,
    same_names,
    source_name,
    split_slice,
)
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

_LISTED = 5  # of the rows that are left out


class UnusableRow(ValueError):
    """A row without an answer to judge by, which is left out, counted and listed, where any other bad row stops the run."""

    def __init__(self, reason: str, trains: Example | None = None) -> None:
        """``trains`` is the example that the row is for training, where nothing is judged; None leaves it out there too."""
        super().__init__(reason)
        self.trains = trains


class TaskFamily(SupervisedDataModule):
    """Rows from anywhere, one prompt template, one example a row; a family implements :meth:`example`."""

    tasks: ClassVar[tuple[str, ...]]
    """Names that stand for a file under ``data_dir``."""

    suffixes: ClassVar[tuple[str, ...]] = ROW_SUFFIXES
    """What the names of this family's files end in."""

    sample_tasks: ClassVar[tuple[str, ...]] = ()
    """Those that are embedded: what ``data_dir: samples`` trains and tests on by default."""

    def __init__(
        self,
        *,
        template: Template | None = None,
        train: list[str] | None = None,
        validation: list[str] | int | float | None = None,
        test: list[str] | None = None,
        data_dir: str = "samples",
        **common: Any,
    ) -> None:
        """A source is a task name (the file ``data_dir/NAME/<split>.json``), a path or web address, or a hub id.

        A file is a JSON list, JSON lines, CSV with a header or Parquet, by its ending. A hub id may name a configuration and a
        split, ``owner/name:config@split``. ``[:2000]`` after a source takes its first 2,000 rows, ``[2000:]`` the others.

        Args:
            template: alpaca, plain, or chat, the tokenizer's own chat template.
            train: Sources of the training split. Where it is not given, or names embedded samples alone, the sample stands for
                every split that is not given. A source with a slice is quoted in YAML lists: ``["openbookqa[:2000]"]``.
            validation: Sources of the validation split, or how many rows are held out of training: a number, or a share.
            test: Sources of the test split.
            data_dir: Folder, or its web address, with one folder per task; samples means the embedded rows. $VARIABLES
                are expanded.
            common: What every data module can be told: see :class:`SupervisedDataModule`.
        """
        super().__init__(held_out=validation if isinstance(validation, int | float) else None, **common)
        self.template: Template = template  # type: ignore[assignment]  # render refuses None
        self.data_dir = data_dir
        own_rows = any(source.partition("[")[0] not in self.sample_tasks for source in train or [])
        default = [] if own_rows or data_dir != "samples" else list(self.sample_tasks)
        self.sources = {
            "train": train if train is not None else default,
            "validation": validation if isinstance(validation, list) else default,
            "test": test if test is not None else default,
        }

    @abstractmethod
    def example(self, row: dict[str, Any], task: str) -> Example:
        """One row as an example. Raises ValueError, saying what was expected, for a row that cannot be used.

        A row that should not stop the run raises UnusableRow.
        """

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work, missing files included; reads no rows."""
        found = super().problems(stage)
        if self.template not in get_args(Template):
            found.append(unknown("template", self.template, get_args(Template)))
        for split in self.splits(stage):
            if not self.sources[split]:
                also = ", or a number of rows to hold out of training" if split == "validation" else ""
                found.append(
                    f"data.{split}: no source given; accepted: a list of task names, files or hub ids{also}"
                )
            for source in self.sources[split]:
                found += [f"data.{split}: {text}" for text in self._source_problems(source, split)]
            if split == "test" or (
                split == "train" and self.weights is not None
            ):  # results and weights are told by name
                found += [f"data.{split}: {text}" for text in same_names(self.sources[split])]
        if self.weights is not None and "train" in self.splits(stage):
            found += weight_problems(self.weights, [source_name(source) for source in self.sources["train"]])
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the data the backbone's tokenizer. Raises ConfigError when it lacks the chat template that is asked for."""
        if self.template == "chat" and not tokenizer.chat_template:
            others = ", ".join(name for name in get_args(Template) if name != "chat")
            raise ConfigError(
                f"data.template: chat needs a tokenizer with a chat template, and this one has none; use {others}"
            )
        super().connect(tokenizer)

    def examples(self, split: str) -> Iterator[Example]:
        """The example of every row of a split's sources, in order; unusable rows are left out, and a warning lists them."""
        left_out: list[str] = []
        for source in self.sources[split]:
            name, part = split_slice(source)
            file = self._file(name, split)
            rows = hub_rows(name, split) if file is None else self.file_rows(file)
            for where, row in islice(rows, part.start, part.stop):
                try:
                    yield self.example(row, source_name(source))
                except UnusableRow as error:
                    if split == "train" and error.trains is not None:
                        yield error.trains
                    else:
                        left_out.append(f"{where}: {error}")
                except ValueError as error:
                    raise ConfigError(f"{where}: {error}") from error
        if left_out:
            listed = "; ".join(left_out[:_LISTED]) + ("; …" if len(left_out) > _LISTED else "")
            log.warning(
                "data.%s: %d rows without an answer to judge by are left out: %s",
                split,
                len(left_out),
                listed,
            )

    def task_file(self, task: str, split: str) -> str:
        """The file of a task under ``data_dir``: the first of the formats that is there; ``.json`` where none is to be seen."""
        folder = self._folder()
        there = (f"{task}/{split}{suffix}" for suffix in ROW_SUFFIXES)
        return next((file for file in there if Path(f"{folder}/{file}").is_file()), f"{task}/{split}.json")

    def file_rows(self, file: str) -> Iterator[tuple[str, Any]]:
        """Every row of a file with the words that say where it stands."""
        return file_rows(file)

    def _file(self, name: str, split: str) -> str | None:
        """The path or web address of a source's file, or None for a hub id."""
        name = local_path(name)
        if name.lower().endswith(SUFFIXES) or is_address(name):
            return name
        if "/" in name:
            return None
        return f"{self._folder()}/{self.task_file(name, split)}"

    def _folder(self) -> str:
        """The path or web address of ``data_dir``."""
        if self.data_dir == "samples":
            return str(resources.files("gatera_lightning.datamodules") / "samples")
        return local_path(self.data_dir).rstrip("/")

    def _source_problems(self, source: str, split: str) -> list[str]:
        name, _ = split_slice(source)
        if name.endswith("]"):
            return [
                f"{source!r} ends in no slice; accepted: [a:b], either of which may be left out, of numbers from 0 on"
            ]
        file = self._file(name, split)
        if file is not None and not file.lower().endswith(self.suffixes):
            return [f"{source!r} is no file of rows; accepted: {', '.join(self.suffixes)}"]
        if file is None or is_address(file) or Path(file).is_file():
            return []
        if "$" in file:
            return [
                f"{source!r}: the variable {file[file.index('$') :].partition('/')[0]} of {file} is not set"
            ]
        if name in self.tasks:
            folder = Path(file).parent.parent
            there = ", ".join(sorted(p.name for p in folder.glob("*") if p.is_dir())) or "no task folders"
            return [f"task {name!r} needs the file {file}, which does not exist; {folder} holds {there}"]
        if name.lower().endswith(SUFFIXES):
            return [f"the file {file} does not exist"]
        accepted = f"{', '.join(self.tasks)}, a file ({', '.join(self.suffixes)}), or a hub id (owner/name)"
        return [f"task {name!r} is unknown; accepted: {accepted}"]
