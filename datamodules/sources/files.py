"""Read rows from JSON, JSON Lines, CSV and Parquet files, given by path or URL."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gatera_lightning.datamodules.sources.spec import is_url
from gatera_lightning.errors import ConfigError


def download(url: str) -> Path:
    """Download a file into the cache of ``datasets``, or find it there.

    Raises:
        ConfigError: The file cannot be downloaded.
    """
    from datasets import DownloadConfig, DownloadManager

    try:
        return Path(str(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(url)))
    except Exception as error:  # the client raises a dozen unrelated types
        raise ConfigError(
            f"cannot download {url} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def read_text(location: str) -> str:
    """Read a UTF-8 text file, without its byte order mark.

    Args:
        location: Path or URL.

    Raises:
        ConfigError: The file cannot be read, or is not UTF-8.
    """
    path = download(location) if is_url(location) else Path(location)
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")  # spreadsheets write one
    except UnicodeDecodeError as error:
        raise ConfigError(f"{location}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{location}: cannot be read ({error.strerror})") from error


def read_json(location: str) -> Any:
    """Read a JSON file.

    Args:
        location: Path or URL.

    Raises:
        ConfigError: The file cannot be read, or is not valid JSON.
    """
    try:
        return json.loads(read_text(location))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{location}: not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        ) from error


def read_rows(location: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table: a JSON list, JSON Lines, CSV with a header, or Parquet.

    Args:
        location: Path or URL. The file name's ending selects the format; an unknown ending is read as a JSON
            list.

    Yields:
        Where the row is, for error messages, and the row. Rows are counted from 1 (``train.json, row 3``); in
        JSON Lines the number is that of the line.

    Raises:
        ConfigError: The file cannot be read, is malformed or is truncated. A CSV file that was truncated
            within its last field, or a file truncated between two rows, cannot be recognized.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    for number, row in readers.get(Path(location).suffix.lower(), _json_list)(location):
        yield f"{location}, row {number}", row


def _json_list(location: str) -> Iterator[tuple[int, Any]]:
    rows = read_json(location)
    if not isinstance(rows, list):
        raise ConfigError(f"{location}: expected a JSON list of rows, found {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _json_lines(location: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines, which also splits at characters that are allowed within a JSON text.
    lines = read_text(location).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            hint = "; the file ends here without a newline, is it truncated?" if number == len(lines) else ""
            raise ConfigError(
                f"{location}, row {number}: not valid JSON ({error.msg}, column {error.colno}){hint}"
            ) from error


def _csv_rows(location: str) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KB, is too short for some texts
    reader = csv.reader(io.StringIO(read_text(location), newline=""), strict=True)
    number = 0
    try:
        header = next(reader, [])
        if not header or len(set(header)) < len(header):
            raise ConfigError(
                f"{location}: expected a header with distinct column names, found {','.join(header)!r:.70}"
            )
        for number, fields in enumerate(filter(None, reader), 1):
            if len(fields) != len(header):
                raise ConfigError(
                    f"{location}, row {number} (line {reader.line_num}): expected {len(header)} fields "
                    f"({', '.join(header)}), found {len(fields)}"
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ConfigError(
            f"{location}, row {number + 1} (line {reader.line_num}): not valid CSV ({error})"
        ) from error


def _parquet_rows(location: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path = download(location) if is_url(location) else Path(location)
    if not path.is_file():
        raise ConfigError(f"{location}: cannot be read (no such file)")
    number = 0
    try:
        file = ParquetFile(path)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise ConfigError(f"{location}: expected distinct column names, found {', '.join(columns)}")
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{location}: not a valid Parquet file, reading failed after {number} rows "
            f"({' '.join(str(error).split())}); is it truncated?"
        ) from error
