"""The base class of all tasks: rows from files, URLs or the hub, each of which becomes one example."""

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, get_args

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batching.mixture import weight_problems
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.settings import shown
from gatera_lightning.datamodules.sources.files import read_rows
from gatera_lightning.datamodules.sources.hub import read_hub_rows
from gatera_lightning.datamodules.sources.spec import (
    ROW_SUFFIXES,
    Source,
    data_suffix,
    duplicate_names,
    expand_path,
    is_url,
    looks_like_path,
)
from gatera_lightning.errors import ConfigError, near_miss, printable, unknown_value

log = logging.getLogger(__name__)

_MAX_LISTED_ROWS = 5


class UnusableRow(ValueError):
    """A row without a usable answer: skipped with a warning, unlike other bad rows."""

    def __init__(self, reason: str, training_example: Example | None = None) -> None:
        """Describe the row.

        Args:
            reason: What is wrong with the row.
            training_example: The row as an example for training, which needs no parseable answer; None skips
                the row there too.
        """
        super().__init__(reason)
        self.training_example = training_example


class TaskDataModule(SupervisedDataModule):
    """Examples from rows, with one prompt template. Subclasses implement :meth:`example`."""

    tasks: ClassVar[tuple[str, ...]]
    """Task names: sources that are files in ``data_dir``."""

    suffixes: ClassVar[tuple[str, ...]] = ROW_SUFFIXES
    """Accepted file name endings."""

    sample_tasks: ClassVar[tuple[str, ...]] = ()
    """Tasks that are part of the package; the default sources of ``data_dir: samples``."""

    def __init__(
        self,
        *,
        template: Template | None = None,
        train: list[str] | str | None = None,
        validation: list[str] | int | float | str | None = None,
        test: list[str] | str | None = None,
        data_dir: str = "samples",
        **common: Any,
    ) -> None:
        """Set the sources of each split and the prompt template.

        A source is the name of a task (the file ``data_dir/NAME/SPLIT.json``), a path, a URL, or a hub
        dataset. Files are JSON lists, JSON Lines, CSV or TSV with a header, or Parquet, selected by their
        ending; all but Parquet may be compressed (.gz). A hub dataset may name a configuration and a split:
        ``owner/name:configuration@split``. ``[:2000]`` after a source reads its first 2,000 rows, and
        ``[2000:]`` the others.

        Args:
            template: How a request becomes a prompt: alpaca, plain, or chat, the tokenizer's own chat
                template. chat suits instruct models; alpaca and plain work with every tokenizer.
            train: Sources of the training split, a list or a single one: task names, paths, URLs or hub ids
                (owner/name:configuration@split). A slice reads some of the rows; quote it in YAML lists:
                ["openbookqa[:2000]"]. Splits without sources use the sample data, unless train names data of
                your own.
            validation: Sources of the validation split; or a number of training examples, or a fraction of
                them, to validate on instead. More of them make the validation loss less noisy, but leave
                fewer to train on.
            test: Sources of the test split.
            data_dir: Folder, or its URL, with one folder per task; samples is the sample data of the package.
                $VARIABLES are expanded.
            common: Settings of :class:`SupervisedDataModule`.
        """
        train, test = _source_list(train), _source_list(test)
        if not isinstance(validation, int | float):
            validation = _source_list(validation)
        super().__init__(held_out=validation if isinstance(validation, int | float) else None, **common)
        self.template: Template = template  # type: ignore[assignment]  # render rejects None
        self.data_dir = os.fspath(data_dir) if isinstance(data_dir, os.PathLike) else data_dir
        self._logged: set[tuple[str, str]] = set()
        has_own_data = any(str(source).partition("[")[0] not in self.sample_tasks for source in train or [])
        default = [] if has_own_data or data_dir != "samples" else list(self.sample_tasks)
        self.sources = {
            "train": train if train is not None else default,
            "validation": validation if isinstance(validation, list) else default,
            "test": test if test is not None else default,
        }

    @abstractmethod
    def example(self, row: dict[str, Any], task: str) -> Example:
        """Build the example of a row.

        Args:
            row: A row of a source.
            task: Name of the source, under which results are reported.

        Raises:
            UnusableRow: The row has no correct answer to compare with, and should be skipped.
            ValueError: The row is malformed; the message says what was expected. This stops the run.
        """

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings, missing files included; no rows are read.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        found = super().problems(stage)
        if self.template not in get_args(Template):
            found.append(unknown_value("data.template", self.template, get_args(Template)))
        if not isinstance(self.data_dir, str) or not self.data_dir:
            found.append(f"data.data_dir: {shown(self.data_dir)}; accepted: a folder, its URL, or samples")
            return found
        for split in self.splits(stage):
            if not self.sources[split]:
                count = ", or a number of examples to take from training" if split == "validation" else ""
                found.append(
                    f"data.{split}: no sources; accepted: a list of task names, files or hub ids{count}"
                )
            sources = self.sources[split]
            problems = [problem for text in sources for problem in self._source_problems(text, split)]
            found += [f"data.{split}: {printable(problem)}" for problem in problems]
            if problems:
                continue
            # Test results and training weights are assigned to sources by name.
            if split == "test" or (split == "train" and self.weights is not None):
                found += [f"data.{split}: {problem}" for problem in duplicate_names(self.sources[split])]
        if self.weights is not None and "train" in self.splits(stage):
            names = [Source.parse(str(source)).name for source in self.sources["train"]]
            found += weight_problems(self.weights, names)
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the backbone's tokenizer.

        Raises:
            ConfigError: The template is ``chat`` and the tokenizer has no chat template.
        """
        if self.template == "chat" and not tokenizer.chat_template:
            others = ", ".join(name for name in get_args(Template) if name != "chat")
            raise ConfigError(
                "data.template: chat needs a tokenizer with a chat template, and this one has none; "
                f"use {others}"
            )
        super().connect(tokenizer)

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split, source by source, and warn about skipped rows at the end.

        Args:
            split: ``train``, ``validation`` or ``test``.

        Raises:
            ConfigError: A source cannot be read, or a row is malformed; the message names the file and the
                row.
        """
        skipped, empty, yielded = list[str](), list[str](), False
        for source in map(Source.parse, self.sources[split]):
            file = self._resolve_file(source.location, split)
            rows = read_hub_rows(source.location, split) if file is None else read_rows(file)
            for place, row in self._selected(rows, source, split, empty):
                yielded = True
                try:
                    yield replace(self.example(row, source.name), place=place)
                except UnusableRow as error:
                    if split == "train" and error.training_example is not None:
                        yield replace(error.training_example, place=place)
                    else:
                        skipped.append(f"{place}: {error}")
                except KeyError as error:
                    raise ConfigError(printable(f"{place}: field {error} is missing")) from error
                except RecursionError as error:
                    raise ConfigError(printable(f"{place}: values are nested too deeply")) from error
                except ValueError as error:
                    raise ConfigError(printable(f"{place}: {error}")) from error
        if empty:
            reason = "; ".join(empty)
            raise ConfigError(
                printable(f"data.{split}: {reason if yielded else f'the split is empty: {reason}'}")
            )
        if skipped:
            more = ["…"] if len(skipped) > _MAX_LISTED_ROWS else []
            log.warning(
                "data.%s: skipped %d rows without a usable answer: %s",
                split,
                len(skipped),
                printable("; ".join(skipped[:_MAX_LISTED_ROWS] + more)),
            )

    def _selected(
        self, rows: Iterator[tuple[str, Any]], source: Source, split: str, empty: list[str]
    ) -> Iterator[tuple[str, Any]]:
        """Yield the rows of a source's slice; if there are none, add the reason to ``empty``."""
        total = 0
        for total, found in enumerate(rows, 1):
            if total > (source.rows.start or 0):
                yield found
            if total == source.rows.stop:  # later rows need not even be readable
                return
        if problem := self.report_slice(source, total, split):
            empty.append(problem)

    def report_slice(self, source: Source, total: int, split: str, noun: str = "rows") -> str:
        """Log a slice that goes beyond the data, and return why it selects nothing; empty if it does.

        Args:
            source: The source.
            total: Number of rows that it has.
            split: The split that reads it.
            noun: What the slice counts.
        """
        try:
            remark = source.check_size(total, noun)
        except ValueError as error:
            return str(error)
        if remark and (split, remark) not in self._logged:  # the test split is read twice
            log.warning("data.%s: %s", split, printable(remark))
            self._logged.add((split, remark))
        return ""

    def task_file(self, task: str, split: str) -> str:
        """Return the file of a task, relative to ``data_dir``: the first existing format, or ``.json``."""
        folder = self._data_folder()
        files = (f"{task}/{split}{suffix}" for suffix in ROW_SUFFIXES)
        existing = (file for file in files if Path(f"{folder}/{file}").is_file())
        return next(existing, f"{task}/{split}.json")

    def _resolve_file(self, location: str, split: str) -> str | None:
        """The path or URL of the file that a source names; None for a hub dataset."""
        location = expand_path(location)
        if data_suffix(location) or is_url(location):
            return location
        if "/" in location:
            return None
        return f"{self._data_folder()}/{self.task_file(location, split)}"

    def _data_folder(self) -> str:
        """The path or URL of ``data_dir``."""
        if self.data_dir == "samples":
            return str(resources.files("gatera_lightning.datamodules") / "samples")
        return expand_path(self.data_dir).rstrip("/")

    def _source_problems(self, text: Any, split: str) -> list[str]:
        if not isinstance(text, str):
            return [f"{text!r} is no source; accepted: a task name, a file, a URL or a hub id, as text"]
        source = Source.parse(text)
        location = source.location
        if location.endswith("]"):
            return [
                f"{text!r} has no valid slice; accepted: [start:stop] with optional non-negative integers"
            ]
        if source.selects_nothing:
            return [f"{text!r} selects no rows; accepted: a slice [start:stop] with start below stop"]
        file = self._resolve_file(location, split)
        path = file if file is not None and location in self.tasks else expand_path(location)
        if os.path.isdir(path):
            return [f"{text!r} is a folder; accepted: a file ({', '.join(self.suffixes)})"]
        named_by_path = data_suffix(path) or is_url(path) or looks_like_path(path)
        if named_by_path and data_suffix(path) not in self.suffixes:
            if problem := _unset_variable(text, path):
                return [problem]
            return [f"{text!r} has an unknown file format; accepted: {', '.join(self.suffixes)}"]
        if file is None or is_url(file) or os.path.isfile(file):
            return []
        if os.path.exists(file):
            return [f"{text!r} is a pipe or a device; accepted: a regular file"]
        if problem := _unset_variable(text, file):
            return [problem]
        if location in self.tasks:
            folder = Path(file).parent.parent
            tasks = sorted(path.name for path in folder.glob("*") if path.is_dir())
            contents = f"{folder} contains {', '.join(tasks) or 'no task folders'}"
            return [f"task {location!r} needs the file {file}, which does not exist; {contents}"]
        if data_suffix(location):
            return [f"the file {file} does not exist"]
        accepted = f"{', '.join(self.tasks)}, a file ({', '.join(self.suffixes)}), or a hub id (owner/name)"
        return [f"task {location!r} is unknown; accepted: {accepted}{near_miss(location, self.tasks)}"]


def _source_list(sources: Any) -> Any:
    """The sources of a split as a list; a single one needs none. What is no source stays, to be refused."""
    if sources is None:
        return None
    if isinstance(sources, str | os.PathLike):
        return [os.fspath(sources)]
    if isinstance(sources, list | tuple):
        return [os.fspath(source) if isinstance(source, os.PathLike) else source for source in sources]
    return [sources]


def _unset_variable(text: str, path: str) -> str:
    """Say which variable of a path is not set; empty if there is none."""
    if "$" not in path:
        return ""
    return f"{text!r}: the variable {path[path.index('$') :].partition('/')[0]} in {path} is not set"
