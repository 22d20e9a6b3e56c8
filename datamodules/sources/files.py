"""Where rows come from: a file here or at an address, or a data set on the hub, with the place of each row."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gatera_lightning.errors import ConfigError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""What the name of a file of rows ends in."""

SUFFIXES = (*ROW_SUFFIXES, ".txt")
"""What the name of any file of data ends in."""

_HUB = re.compile(r"^(?P<id>[^:@]*)(?::(?P<config>[^@]*))?(?:@(?P<split>.*))?$")
_SLICE = re.compile(r"^(?P<name>.*?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$")


def split_slice(source: str) -> tuple[str, slice]:
    """``"ARC-Easy[100:300]"`` -> ``("ARC-Easy", slice(100, 300))``; either end, or all of it, may be left out."""
    match = _SLICE.match(source)
    assert match is not None  # the pattern matches every string
    start, stop = (int(end) if end else None for end in (match["start"], match["stop"]))
    return match["name"], slice(start, stop)


def source_name(source: str) -> str:
    """What a source is called in results: task, data set, or file; the file's folder where the file is named for a split."""
    name = split_slice(source)[0]
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        return path.name if is_address(name) else Path(_HUB.match(name)["id"]).name  # type: ignore[index]
    return (
        path.parent.name if path.stem in ("train", "validation", "test") and path.parent.name else path.stem
    )


def same_names(sources: Sequence[str]) -> list[str]:
    """Where two sources, not slices of one, would be called the same; empty when all is well."""
    by_name: dict[str, list[str]] = {}
    for source in sources:
        by_name.setdefault(source_name(source), []).append(split_slice(source)[0])
    return [
        f"{' and '.join(distinct)} are both called {name!r}; accepted: sources whose names differ"
        for name, whole in by_name.items()
        if len(distinct := list(dict.fromkeys(whole))) > 1
    ]


def is_address(path: str) -> bool:
    """Whether ``path`` is fetched from the web."""
    return path.startswith(("https://", "http://"))


def local_path(path: str) -> str:
    """``path`` with ``~`` and ``$VARIABLES`` replaced."""
    return os.path.expanduser(os.path.expandvars(path))


def fetched(address: str) -> Path:
    """The file at a web address, downloaded once into the cache of ``datasets``. Raises ConfigError when it cannot be had."""
    from datasets import DownloadConfig, DownloadManager

    try:
        return Path(str(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(address)))
    except Exception as error:  # as in hub_rows
        raise ConfigError(
            f"cannot fetch {address} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def file_text(name: str) -> str:
    """What the file at a path or web address holds. Raises ConfigError when it cannot be had or is not UTF-8."""
    path = fetched(name) if is_address(name) else Path(name)
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")  # as spreadsheets begin theirs
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error


def file_json(name: str) -> Any:
    """What the JSON at a path or web address says. Raises ConfigError when it cannot be had or is malformed."""
    try:
        return json.loads(file_text(name))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        ) from error


def file_rows(name: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file at a path or web address, each with ``name, row N`` (from 1; a line of the file where it is JSON lines).

    A JSON list (``.json``), JSON lines (``.jsonl``), a table with a header (``.csv``), or Parquet, by the ending of the name.
    Raises ConfigError when it cannot be had, is malformed, or was cut in the middle of a row (of a table's last field, no one
    can tell).
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    for number, row in readers.get(Path(name).suffix.lower(), _json_list)(name):
        yield f"{name}, row {number}", row


def _json_list(name: str) -> Iterator[tuple[int, Any]]:
    rows = file_json(name)
    if not isinstance(rows, list):
        raise ConfigError(f"{name}: expected a JSON list of rows, found {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _json_lines(name: str) -> Iterator[tuple[int, Any]]:
    lines = file_text(name).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                cut = (
                    "; the file ends there, without a line break: was it cut?" if number == len(lines) else ""
                )
                raise ConfigError(
                    f"{name}, row {number}: not JSON ({error.msg}, column {error.colno}){cut}"
                ) from error


def _csv_rows(name: str) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KB that spreadsheets need
    reader = csv.reader(io.StringIO(file_text(name), newline=""), strict=True)
    number = 0
    try:
        header = next(reader, [])
        if not header or len(set(header)) < len(header):
            raise ConfigError(
                f"{name}: expected a first line with a name for each column, found {','.join(header)!r:.70}"
            )
        for number, fields in enumerate(filter(None, reader), 1):
            if len(fields) != len(header):
                raise ConfigError(
                    f"{name}, row {number} (line {reader.line_num}): {len(fields)} fields; expected {len(header)}, as the "
                    f"header has: {', '.join(header)}"
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{name}, row {number + 1} (line {reader.line_num}): not CSV ({error})") from error


def _parquet_rows(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path = fetched(name) if is_address(name) else Path(name)
    if not path.is_file():
        raise ConfigError(f"{name}: cannot be read (there is no such file)")
    number = 0
    try:
        file = ParquetFile(path)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise ConfigError(
                f"{name}: expected a name of its own for each column, found {', '.join(columns)}"
            )
        for part in file.iter_batches():
            for row in part.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name}: not a whole Parquet file, after {number} rows ({' '.join(str(error).split())}); was it cut?"
        ) from error


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a hub data set, with ``name[split], row N``.

    ``owner/name:config`` names one of several configurations, ``owner/name@split`` a split that is called otherwise than
    ``split``. Raises ConfigError when it cannot be fetched.
    """
    from datasets import load_dataset

    found = _HUB.match(name)
    assert found is not None  # the pattern matches every string
    there = found["split"] or split
    try:
        table = load_dataset(found["id"], found["config"], split=there)
    except (
        Exception
    ) as error:  # the hub client raises a dozen unrelated types; all of them mean "not to be had"
        raise ConfigError(
            f"data.{split}: cannot fetch {name!r} from the hub ({type(error).__name__}: {' '.join(str(error).split())}). "
            "A configuration is given as owner/name:config, another split as owner/name@split. Without network, give local "
            "files."
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{found['id']}[{there}], row {number}", row
