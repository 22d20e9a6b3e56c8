"""Files of predictions: one part file per rank while an evaluation runs, one merged file at the end."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gatera_lightning.checkpointing.atomic_files import write_text
from gatera_lightning.errors import ConfigError, printable
from gatera_lightning.evaluation.identity import IDENTITY_FILE
from gatera_lightning.evaluation.predictions import KINDS, Kind, Records

PREDICTIONS_FILE = "predictions.jsonl"


class PartFile:
    """Appends the predictions of one rank to a new ``part-<rank>-<number>.jsonl``, one line per batch.

    Every batch is flushed when it is written. If the process is killed in the middle of a line, that batch is
    computed again; since every run starts a new file, nothing is ever appended to an incomplete line.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        tails = (path.stem.rpartition("-")[2] for path in folder.glob(f"part-{rank}-*.jsonl"))
        number = max((int(tail) for tail in tails if tail.isdecimal()), default=-1) + 1
        self._file = (folder / f"part-{rank}-{number}.jsonl").open("x", encoding="utf-8")

    def write(self, records: Records) -> None:
        """Append the predictions of one batch."""
        line = json.dumps([[kind, example, record] for (kind, example), record in records.items()])
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(folder: Path) -> Records:
    """Read the predictions that earlier runs wrote to a folder, in part files and in the merged file.

    Raises:
        ConfigError: A complete line cannot be read.
    """
    found: Records = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        *lines, _incomplete = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                for kind, example, record in json.loads(line):
                    found[_checked(kind, example)] = record
            except (ValueError, TypeError, RecursionError) as error:
                raise ConfigError(
                    printable(
                        f"{path}, line {number}: corrupt ({error}); "
                        "delete the file to compute its examples again"
                    )
                ) from error
    merged = folder / PREDICTIONS_FILE
    if merged.is_file():
        # Split as bytes: str.splitlines would also split at characters such as U+2028.
        for number, line in enumerate(merged.read_bytes().splitlines(), 1):
            try:
                fields = json.loads(line)
                example = fields["example"]
                found |= {_checked(kind, example): fields[kind] for kind in KINDS if kind in fields}
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ConfigError(
                    f"{merged}, line {number}: corrupt ({error!r}); "
                    "delete the file to compute every example again"
                ) from error
    return found


def _checked(kind: Any, example: Any) -> tuple[Kind, int]:
    if kind not in KINDS or not isinstance(example, int) or isinstance(example, bool) or example < 0:
        raise ValueError(f"no prediction of kind {kind!r:.20} for example {example!r:.20}")
    return kind, example


def write_predictions(folder: Path, examples: Iterable[Mapping[str, Any]]) -> None:
    """Write the merged file atomically, one line per example, then delete the part files."""
    # Characters that would control a terminal are escaped, which is the same text in JSON.
    lines = (printable(json.dumps(example, ensure_ascii=False)) + "\n" for example in examples)
    write_text(folder / PREDICTIONS_FILE, "".join(lines))
    _delete_parts(folder)


def delete_predictions(folder: Path) -> None:
    """Delete the part files, the merged file and the identity; leave all other files of the folder."""
    _delete_parts(folder)
    for name in (PREDICTIONS_FILE, IDENTITY_FILE):
        (folder / name).unlink(missing_ok=True)


def _delete_parts(folder: Path) -> None:
    for path in folder.glob("part-*.jsonl"):
        path.unlink(missing_ok=True)
