"""Files of rows: formats, malformed and truncated files, and files at a URL."""

import csv
import gzip
import io
import json
import socket

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.sources.files import read_rows
from gatera_lightning.errors import ConfigError

ROWS = [
    {"a": "one, two", "b": 'says "hi"'},
    {"a": "two\n\nlines", "b": "Grüße 👋"},
    {"a": " spaces ", "b": ""},
    {"a": "a\u2028b\x0bc\x85d\u2029e", "b": "characters at which str.splitlines splits"},
]


def to_json(rows):
    return json.dumps(rows, ensure_ascii=False).encode()


def to_jsonl(rows):
    return b"".join(to_json(row) + b"\n" for row in rows)


def to_csv(rows, **dialect):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_parquet(rows, **settings):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **settings)
    return stream.getvalue()


def to_tsv(rows):
    return to_csv(rows, delimiter="\t")


FORMATS = {
    **{"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "tsv": to_tsv, "parquet": to_parquet},
    "json.gz": lambda rows: gzip.compress(to_json(rows)),
    "jsonl.gz": lambda rows: gzip.compress(to_jsonl(rows)),
    "csv.gz": lambda rows: gzip.compress(to_csv(rows)),
    "tsv.gz": lambda rows: gzip.compress(to_tsv(rows)),
}


@pytest.fixture
def put(tmp_path):
    """``put("rows.csv", content)`` writes bytes and returns the path."""

    def store(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return store


def rows_of(path):
    return [row for _, row in read_rows(path)]


def error_of(path):
    """Read a file until it fails, and return the error message after the path."""
    with pytest.raises(ConfigError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    return message.removeprefix(path)


# --- formats ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_rows(suffix, put):
    path = put(f"rows.{suffix}", FORMATS[suffix](ROWS))
    assert list(read_rows(path)) == [(f"{path}, row {number}", row) for number, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_slices_apply_to_all_formats(suffix, put, make_instruction_data):
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(5)]
    path = put(f"rows.{suffix}", FORMATS[suffix](rows))
    examples = list(make_instruction_data(train=[f"{path}[1:3]", f"{path}[4:]"]).examples("train"))
    assert [example.answers[0] for example in examples] == [" answer 1", " answer 2", " answer 4"]
    assert [example.task for example in examples] == ["rows"] * 3


def test_file_suffix_ignores_case(put):
    assert rows_of(put("rows.CSV", to_csv(ROWS))) == ROWS


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_byte_order_mark_is_ignored(suffix, put):
    assert rows_of(put(f"rows.{suffix}", b"\xef\xbb\xbf" + FORMATS[suffix](ROWS))) == ROWS


def test_json_lines_skips_blank_lines_and_counts_them(put):
    path = put("rows.jsonl", b'\r\n{"a": 1}\r\n\r\n  \r\n{"a": 2}')
    assert list(read_rows(path)) == [(f"{path}, row 2", {"a": 1}), (f"{path}, row 5", {"a": 2})]


@pytest.mark.parametrize(
    "dialect", [{"lineterminator": "\n"}, {"lineterminator": "\r\n"}, {"quoting": csv.QUOTE_ALL}]
)
def test_csv_dialects(dialect, put):
    assert rows_of(put("rows.csv", to_csv(ROWS, **dialect))) == ROWS


def test_csv_skips_blank_lines_without_counting_them(put):
    path = put("rows.csv", b"a,b\n\n1,2\n\n\n3,4")
    assert list(read_rows(path)) == [
        (f"{path}, row 1", {"a": "1", "b": "2"}),
        (f"{path}, row 2", {"a": "3", "b": "4"}),
    ]


def test_csv_accepts_long_fields(put):
    rows = [{"text": "long " * 40_000}]
    assert rows_of(put("rows.csv", to_csv(rows))) == rows


def test_parquet_reads_all_row_groups_and_nested_columns(put):
    said = [{"role": "user", "content": "hi"}]
    rows = [{"number": number, "said": said, "none": None} for number in range(7)]
    path = put("rows.parquet", to_parquet(rows, row_group_size=2))
    assert list(read_rows(path)) == [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSON"])
def test_json_list_and_json_lines_are_read_under_either_name(name, put):
    assert rows_of(put(name, to_json(ROWS))) == ROWS
    assert rows_of(put(name, json.dumps(ROWS, indent=2).encode())) == ROWS
    assert rows_of(put(name, to_jsonl(ROWS))) == ROWS
    path = put(name, b'\n{"a": 1}\r\n\n{"a": 2}')
    assert list(read_rows(path)) == [(f"{path}, row 2", {"a": 1}), (f"{path}, row 4", {"a": 2})]


def test_one_row_is_a_list_or_a_line(put):
    assert rows_of(put("rows.jsonl", b'[{"a": 1}]')) == rows_of(put("rows.jsonl", b'{"a": 1}')) == [{"a": 1}]
    assert rows_of(put("rows.json", b'[{"a": 1}]')) == [{"a": 1}]
    assert rows_of(put("rows.jsonl", b'["a"]\n["b"]\n')) == [["a"], ["b"]]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (r'{"a": "\ud83d"}', r"field 'a' has \ud83d, half of a surrogate pair"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": ' + "9" * 5_000 + "}", "an integer of 5,000 digits is too large"),
        ('{"a": ' + "[" * 5_000 + "]" * 5_000 + "}", "values are nested too deeply"),
    ],
    ids=["surrogate", "key", "integer", "depth"],
)
def test_invalid_values_are_named_with_their_row(name, row, message, put):
    good = '{"a": 0}'
    assert error_of(put(name, f"{good}\n{good}\n{row}\n".encode())).startswith(f", row 3: {message}")
    assert error_of(put(name, f"[{good},\n {good}, {row}]".encode())).startswith(f", row 3: {message}")


def test_rows_after_a_slice_are_not_parsed(put, make_instruction_data):
    path = put("rows.jsonl", b'{"instruction": "a", "output": "b"}\nnot JSON')
    assert len(list(make_instruction_data(train=[f"{path}[:1]"]).examples("train"))) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("suffix", FORMATS)
@given(data=st.data())
def test_any_bytes_are_rows_or_an_error(suffix, data, tmp_path_factory):
    """Random bytes, and files of which some bytes were changed or cut."""
    content = bytearray(FORMATS[suffix](ROWS))
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=60))
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.mktemp("rows") / f"rows.{suffix}"
    path.write_bytes(bytes(content))
    try:
        message = str(path) if isinstance(rows_of(str(path)), list) else "no list"
    except ConfigError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


# --- missing, malformed and truncated files ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_file_is_named(suffix, tmp_path):
    assert error_of(str(tmp_path / f"gone.{suffix}")).lower().startswith(": cannot be read (no such file")


def test_folder_is_not_a_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    assert error_of(str(tmp_path / "folder.json")) == ": cannot be read (Is a directory)"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_text_has_to_be_utf_8(suffix, put):
    path = put(f"rows.{suffix}", FORMATS[suffix](ROWS).decode().encode("utf-16"))
    hint = "it looks like UTF-16: save it as UTF-8"
    assert error_of(path) == f": not UTF-8 text (invalid start byte at byte 0); {hint}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n {"a": "b",\n  "c" "d"}\n]', ": not valid JSON (Expecting ':' delimiter, line 3, column 7)"),
        ("", ": is empty; expected a JSON list of rows"),
        ("x", ": not valid JSON (Expecting value, line 1, column 1)"),
        ('[{"a": "b"', ": not valid JSON (Expecting ',' delimiter, line 1, column 11)"),
        ('{"rows": []}', ": expected a JSON list of rows, found dict"),
        ('"rows"', ": expected a JSON list of rows, found str"),
    ],
)
def test_malformed_json(content, message, put):
    assert error_of(put("rows.json", content.encode())) == message


@pytest.mark.parametrize("end", [1, 12, -1])
def test_truncated_json(end, put):
    assert error_of(put("rows.json", to_json(ROWS)[:end])).startswith(": not valid JSON (")


def test_truncated_json_lines_are_detected(put):
    """Every possible truncation; between two lines, it cannot be seen that something is missing."""
    content = to_jsonl(ROWS[:2])
    first_line_end = content.index(b"\n")
    for end in range(1, len(content)):
        path = put("rows.jsonl", content[:end])
        if content[end - 1 : end] in b"}\n":
            assert len(rows_of(path)) == (1 if end <= first_line_end + 1 else 2)
            continue
        message = error_of(path)
        if b"\x80" <= content[end : end + 1] < b"\xc0":
            assert message.startswith(": not UTF-8 text (unexpected end of data at byte ")
        else:
            assert message.startswith(f", row {1 if end < first_line_end else 2}: not valid JSON (")
            assert message.endswith("); the file ends here without a newline, is it truncated?")


@pytest.mark.parametrize("rest", [b'{"a": 3}', b""])
def test_malformed_json_line_before_newline_is_not_truncated(rest, put):
    path = put("rows.jsonl", b'{"a": 1}\n{"a": \n' + rest)
    assert error_of(path) == ", row 2: not valid JSON (Expecting value, column 7)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": expected a header with distinct column names, found ''"),
        ("\na,b\n1,2\n", ": expected a header with distinct column names, found ''"),
        ("a,b,a\n1,2,3\n", ": expected a header with distinct column names, found 'a,b,a'"),
        ("a,b\n1,2\n3\n5,6\n", ", row 2 (line 3): expected 2 fields (a, b), found 1"),
        ("a,b\n1,2,3\n", ", row 1 (line 2): expected 2 fields (a, b), found 3"),
        ("a,b\n1,2\n3,4,\n", ", row 2 (line 3): expected 2 fields (a, b), found 3"),
        ('a,b\n"1\n1\n1",2\n\n3\n', ", row 2 (line 6): expected 2 fields (a, b), found 1"),
        ('a,b\n1,2\n3,"4 and', ", row 2 (line 3): not valid CSV (unexpected end of data)"),
        ('a,b\n1,2\n3,"4\nand\n', ", row 2 (line 4): not valid CSV (unexpected end of data)"),
        ('a,b\n1,2\n3,4\n5,"6"7\n', ", row 3 (line 4): not valid CSV (',' expected after '\"')"),
        ('a,"b\n1,2\n', ", row 1 (line 2): not valid CSV (unexpected end of data)"),
    ],
)
def test_malformed_csv(content, message, put):
    assert error_of(put("rows.csv", content.encode())) == message


def test_truncated_csv_is_detected(put):
    """Every possible truncation within the two rows, except directly before the last field."""
    content = to_csv([{"a": "one, two", "b": "it's"}, ROWS[1]], quoting=csv.QUOTE_ALL)
    first, second = (i for i in range(11, len(content)) if content[i - 1 : i + 2] == b'"\r\n')
    for end in {*range(10, first), *range(first + 3, second)}:
        if content[:end].endswith(b'",'):  # the last field looks empty
            continue
        message = error_of(put("rows.csv", content[:end]))
        if b"\x80" <= content[end : end + 1] < b"\xc0":
            assert message.startswith(": not UTF-8 text (unexpected end of data at byte ")
        else:
            assert message.startswith(f", row {1 if end < first else 2} (line ")
            assert "not valid CSV (unexpected end of data)" in message or "found 1" in message


INVALID_PARQUET = ": not a valid Parquet file, reading failed after "


@pytest.mark.parametrize("end", [0, 1, 4, 30, 0.3, 0.5, 0.9, -9, -8, -4, -1])
def test_truncated_parquet(end, put):
    content = to_parquet([{"text": f"row {n} " * 9} for n in range(200)], row_group_size=20)
    end = int(end * len(content)) if isinstance(end, float) else end
    message = error_of(put("rows.parquet", content[:end]))
    assert message.startswith(f"{INVALID_PARQUET}0 rows (")
    assert message.endswith("); is it truncated?")


def test_parquet_with_corrupt_row_group_reports_rows_before_it(put):
    rows = [{"text": f"row {n} " * 9} for n in range(200_000)]
    content = to_parquet(rows, row_group_size=50_000, compression="snappy", use_dictionary=False)
    middle = len(content) * 3 // 4
    path = put("rows.parquet", content[:middle] + b"\xff" * 2000 + content[middle + 2000 :])
    message = error_of(path)
    assert message.startswith(INVALID_PARQUET)
    assert 0 < int(message.removeprefix(INVALID_PARQUET).split()[0]) < len(rows)


def test_parquet_rejects_other_content(put):
    assert error_of(put("rows.parquet", to_csv(ROWS) * 9)).startswith(f"{INVALID_PARQUET}0 rows (")
    stream, latin_1 = io.BytesIO(), pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table([latin_1], names=["a"]), stream)
    assert error_of(put("rows.parquet", stream.getvalue())).startswith(f"{INVALID_PARQUET}0 rows (")


def test_parquet_rejects_duplicate_columns(put):
    stream, column = io.BytesIO(), pyarrow.array(["1"])
    pyarrow.parquet.write_table(pyarrow.table([column, column], names=["a", "a"]), stream)
    path = put("rows.parquet", stream.getvalue())
    assert error_of(path) == ": expected distinct column names, found a, a"


# --- URLs ---


def test_data_dir_may_be_a_url(web, make_data, rows):
    web.put("set/boolq/train.json", rows(3))
    web.put("set/boolq/test.json", rows(5))
    for slash in ("", "/"):
        data = make_data(
            data_dir=f"{web.url}/set{slash}",
            train=["boolq"],
            validation=1,
            test=["boolq[:4]"],
            answer_format="content",
            stage="fit",
        )
        assert data.problems("fit") == data.problems("test") == []
        data.setup("test")
        assert [len(data.tables[split]) for split in ("train", "validation", "test")] == [2, 1, 4]
        assert set(data.tables["test"]["task"]) == {"boolq"}
        assert data.overlaps()[1].size == 4
    assert sorted(web.requests) == ["/set/boolq/test.json", "/set/boolq/train.json"]  # cached afterwards


@pytest.mark.parametrize("suffix", FORMATS)
def test_source_may_be_a_url(suffix, web, make_data, rows):
    url = web.put(f"mine.{suffix}", FORMATS[suffix](rows(4)))
    data = make_data(train=[f"{url}[:3]", "everyday[:2]"], validation=1)
    assert data.problems("fit") == []
    assert web.requests == []  # checking the settings does not use the network
    assert [example.task for example in data.examples("train")] == ["mine"] * 3 + ["everyday"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", '[{"instruction": "a"', ": not valid JSON ("),
        ("dict.json", {"rows": []}, ": expected a JSON list of rows, found dict"),
        ("bad.jsonl", '{}\n{"instruction": \n', ", row 1: field 'instruction' is missing"),
        ("row.csv", "instruction,b\nWhich?,2\n", ", row 1: field 'answer' is missing"),
        ("bad.parquet", "PAR1", f"{INVALID_PARQUET}0 rows ("),
    ],
)
def test_errors_name_the_url(name, content, message, web, make_data):
    url = web.put(name, content)
    with pytest.raises(ConfigError) as caught:
        list(make_data(train=[url]).examples("train"))
    assert str(caught.value).startswith(url + message)


def test_url_that_cannot_be_downloaded(web, make_data, monkeypatch):
    def error():
        with pytest.raises(ConfigError) as caught:
            list(data.examples("train"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    data = make_data(train=["ARC-Easy"], data_dir=f"{web.url}/nowhere", validation=1)
    assert data.problems("fit") == []
    assert error().startswith(f"cannot download {web.url}/nowhere/ARC-Easy/train.json (")

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/rows.json"
        data = make_data(train=[url])
        assert error().startswith(f"cannot download {url} (")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    data = make_data(train=[f"{web.url}/rows.json"])
    assert error().startswith(f"cannot download {web.url}/rows.json (")
    assert "offline" in error().lower()
