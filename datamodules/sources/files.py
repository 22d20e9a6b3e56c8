"""Read rows from JSON, JSON Lines, CSV, TSV and Parquet files, given by path or URL."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from gatera_lightning.datamodules.sources.arrow_nulls import without_added_nulls
from gatera_lightning.datamodules.sources.spec import data_suffix
from gatera_lightning.datamodules.sources.strict_json import first_invalid_element, parse_json
from gatera_lightning.datamodules.sources.text_files import local_file, read_text, refused
from gatera_lightning.errors import ConfigError, checks_arguments

_Rows = Iterator[tuple[int, Any]]


@checks_arguments
def read_json(location: str) -> Any:
    """Read a JSON file. A file of JSON Lines gives the list of its values.

    Args:
        location: Path or URL.

    Raises:
        ConfigError: The file cannot be read, or is not valid JSON.
    """
    text = read_text(location)
    if _has_lines(location, text):
        return [value for _, value in _json_lines(location, text)]
    return _whole_json(location, text)


@checks_arguments
def read_rows(location: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table: a JSON list, JSON Lines, CSV or TSV with a header, or Parquet.

    Args:
        location: Path or URL. The file name's ending selects the format; an unknown ending is read as a JSON
            list. A JSON list may also be in a file of JSON Lines, and the reverse.

    Yields:
        Where the row is, for error messages, and the row. Rows are counted from 1 (``train.json, row 3``); in
        JSON Lines the number is that of the line.

    Raises:
        ConfigError: The file cannot be read, is malformed or is truncated. A CSV file that was truncated
            within its last field, or a file truncated between two rows, cannot be recognized.
    """
    readers = {".csv": _csv_rows, ".tsv": _tsv_rows, ".parquet": _parquet_rows}
    for number, row in readers.get(data_suffix(location).removesuffix(".gz"), _json_rows)(location):
        yield f"{location}, row {number}", row


def _json_rows(location: str) -> _Rows:
    text = read_text(location)
    if _has_lines(location, text):
        yield from _json_lines(location, text)
        return
    rows = _whole_json(location, text)
    if not isinstance(rows, list):
        raise refused(location, f"expected a JSON list of rows, found {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _has_lines(location: str, text: str) -> bool:
    """Whether a text holds several JSON values, one on each line, whatever the file is called."""
    if data_suffix(location).startswith(".jsonl") and not text.lstrip().startswith("["):
        return True
    first_line, _, rest = text.strip().partition("\n")
    try:
        json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return bool(rest)


def _whole_json(location: str, text: str) -> Any:
    if not text.strip():
        raise refused(location, "is empty; expected a JSON list of rows")
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise refused(
            location, f"not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        ) from error
    except ValueError as error:
        row = f", row {first_invalid_element(text)}" if text.lstrip().startswith("[") else ""
        raise refused(f"{location}{row}", str(error)) from error


def _json_lines(location: str, text: str) -> _Rows:
    # Not splitlines, which also splits at characters that are allowed within a JSON text.
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            hint = "; the file ends here without a newline, is it truncated?" if number == len(lines) else ""
            raise refused(
                f"{location}, row {number}", f"not valid JSON ({error.msg}, column {error.colno}){hint}"
            ) from error
        except ValueError as error:
            raise refused(f"{location}, row {number}", str(error)) from error
        yield number, value


def _tsv_rows(location: str) -> _Rows:
    yield from _csv_rows(location, "\t")


def _csv_rows(location: str, delimiter: str = ",") -> _Rows:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KB, is too short for some texts
    reader = csv.reader(io.StringIO(read_text(location), newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(reader, [])
        if not header or len(set(header)) < len(header):
            raise refused(
                location, f"expected a header with distinct column names, found {','.join(header)!r:.70}"
            )
        for number, fields in enumerate(filter(None, reader), 1):
            if len(fields) != len(header):
                raise refused(
                    f"{location}, row {number} (line {reader.line_num})",
                    f"expected {len(header)} fields ({', '.join(header)}), found {len(fields)}",
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise refused(
            f"{location}, row {number + 1} (line {reader.line_num})", f"not valid CSV ({error})"
        ) from error


def _parquet_rows(location: str) -> _Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path = local_file(location)
    number = 0
    try:
        file = ParquetFile(path)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise refused(location, f"expected distinct column names, found {', '.join(columns)}")
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, without_added_nulls(row)
    except ConfigError:
        raise
    # Besides errors of pyarrow: values that Python does not have, such as the year 20000.
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        raise refused(
            location,
            f"not a valid Parquet file, reading failed after {number} rows "
            f"({' '.join(str(error).split())}); is it truncated?",
        ) from error
