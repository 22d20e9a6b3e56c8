"""The ledger: one JSON line for every finished run, which is only ever appended to."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""What a run was, and what it measured."""

LEDGER = Path(__file__).parent / "ledger.jsonl"
"""The ledger that the pages of docs/results are drawn from."""


def read(path: Path = LEDGER) -> list[Line]:
    """Return the lines of a ledger; none if there is no file.

    A line without its end was cut off by a kill, and does not count.

    Raises:
        ValueError: If another line is no JSON.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_text().split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return lines


def append(path: Path, line: Line) -> None:
    """Add a line that is on disk when this returns; removes the rest of a line that a kill cut off.

    Raises:
        ValueError: If a value is NaN or infinite, which JSON cannot say.
    """
    text = json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
