"""Predictions on disk: a line per batch as it is computed, a line per question once all are, none computed twice."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.likelihood_ranking import RankedQuestion, Score

MERGED = "predictions.jsonl"
IDENTITY = "evaluation.json"
FORMAT = 2
"""Raise it when records or the way answers are read change, so that no older prediction is taken for a new one."""

Kind = Literal["likelihood", "generation"]
Records = dict[tuple[Kind, int], dict[str, Any]]
"""What was found for each question (its row number in the split), by the way of evaluating."""


@dataclass(frozen=True)
class Generated:
    """What the model wrote, the answer read out of it, and which candidate that is; None for no answer, or no candidate."""

    text: str
    answer: str | None
    choice: int | None


@dataclass(frozen=True)
class Compared:
    """What the model wrote where nothing is right or wrong, and the text that its words are compared with."""

    text: str
    reference: str


def likelihood_record(question: RankedQuestion) -> dict[str, Any]:
    """What is kept of a ranked question."""
    return {
        "log_likelihoods": list(question.log_likelihoods),
        "tokens": list(question.tokens),
        "characters": list(question.characters),
        "choice": {score: question.choice(score) for score in get_args(Score)},
    }


def generation_record(generated: Generated | Compared) -> dict[str, Any]:
    """What is kept of a completed prompt."""
    return asdict(generated)


class PartFile:
    """The batches that one process has computed, each on disk as soon as it is known.

    One line a batch: a process that is killed while writing leaves a line without an end, and the whole batch is
    computed again. A new file each time, so that nothing is ever written behind such a line.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        numbers = [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"part-{rank}-*.jsonl")]
        number = max(numbers, default=-1) + 1
        self._file = (folder / f"part-{rank}-{number}.jsonl").open("x", encoding="utf-8")

    def write(self, records: Records) -> None:
        """Add one batch."""
        line = json.dumps([[kind, example, record] for (kind, example), record in records.items()])
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more will be written."""
        self._file.close()


def read_records(folder: Path) -> Records:
    """Everything that earlier runs left in a folder. Raises ConfigError for a line that cannot be read."""
    found: Records = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        *lines, _torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                found |= {(kind, example): record for kind, example, record in json.loads(line)}
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: damaged ({error}); without the file its rows are computed anew"
                ) from error
    merged = folder / MERGED
    if merged.is_file():
        for number, line in enumerate(
            merged.read_bytes().splitlines(), 1
        ):  # as text, it would be cut at U+2028 too
            try:
                row = json.loads(line)
                example = row["example"]
                found |= {(kind, example): row[kind] for kind in get_args(Kind) if kind in row}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"{merged}, line {number}: damaged ({error!r}); without the file all is computed anew"
                ) from error
    return found


def write_merged(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the finished file, whole or not at all, and drop the parts."""
    write_whole(folder / MERGED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    discard(folder, merged=False)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def discard(folder: Path, *, merged: bool = True) -> None:
    """Forget what earlier runs left: the parts, and the merged file too unless told otherwise."""
    for path in [*folder.glob("part-*.jsonl"), *([folder / MERGED, folder / IDENTITY] if merged else [])]:
        path.unlink(missing_ok=True)


def check_identity(folder: Path, stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Raise ConfigError, saying what differs, when a folder holds the predictions of another evaluation.

    ``stored`` is the folder's ``evaluation.json``, None without one.
    """
    if stored is None:
        raise ConfigError(
            f"{folder} holds predictions, but no {IDENTITY} that says of what; accepted: an empty folder"
        )
    other = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
    if other:
        details = "; ".join(
            f"{name} was {_short(stored.get(name))} and is {_short(now.get(name))}" for name in other
        )
        raise ConfigError(
            f"{folder} holds predictions of another evaluation, and mixing them would measure neither: {details}. "
            "Give another evaluation.folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
