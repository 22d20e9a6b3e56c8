"""Sources: how they are written, and rows that are fetched from a web address."""

import csv
import functools
import http.server
import io
import json
import socket
import threading

import pyarrow
import pyarrow.parquet
import pytest

from gatera_lightning.datamodules.sources.files import (
    file_rows,
    hub_rows,
    is_address,
    local_path,
    source_name,
    split_slice,
)
from gatera_lightning.errors import ConfigError

# --- how a source is written ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ARC-Easy", ("ARC-Easy", slice(None))),
        ("ARC-Easy[:300]", ("ARC-Easy", slice(300))),
        ("a/b.json[:1]", ("a/b.json", slice(1))),
        ("https://host/a[:2]/b.jsonl[:07]", ("https://host/a[:2]/b.jsonl", slice(7))),
        ("[:5].json", ("[:5].json", slice(None))),
        ("boolq[5:]", ("boolq", slice(5, None))),
        ("boolq[5:30]", ("boolq", slice(5, 30))),
        ("boolq[0:0]", ("boolq", slice(0, 0))),
        ("boolq[:-5]", ("boolq[:-5]", slice(None))),
        ("boolq[-5:]", ("boolq[-5:]", slice(None))),
        ("boolq[:]", ("boolq", slice(None))),
        ("boolq[5]", ("boolq[5]", slice(None))),
    ],
)
def test_slices(source, expected):
    assert split_slice(source) == expected


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("ARC-Easy", "ARC-Easy"),
        ("ARC-Easy[:300]", "ARC-Easy"),
        ("rows.json", "rows"),
        ("/data/my.rows.jsonl[:5]", "my.rows"),
        ("/data/ARC-Easy/test.json", "ARC-Easy"),
        ("/data/ARC-Easy/train.jsonl", "ARC-Easy"),
        ("/data/ARC-Easy/validation.json", "ARC-Easy"),
        ("/data/ARC-Easy/testing.json", "testing"),
        ("test.json", "test"),  # no folder to go by
        ("https://host/main/boolq/test.json[:9]", "boolq"),
        ("https://host/main/mine.json", "mine"),
        ("zwhe99/commonsense_170k", "commonsense_170k"),
        ("owner/rows-1.5[:10]", "rows-1.5"),
        ("owner/test", "test"),
        ("mine.csv[:9]", "mine"),
        ("/data/mine/train.parquet", "mine"),
        ("owner/rows:en", "rows"),
        ("owner/rows@dev[3:5]", "rows"),
        ("owner/rows-1.5:en-v1.1@dev/a", "rows-1.5"),
    ],
)
def test_what_a_source_is_called(source, name):
    assert source_name(source) == name


@pytest.mark.parametrize(
    ("sources", "confused"),
    [
        (["boolq[:10]", "boolq[20:]", "piqa"], ""),
        (
            ["openai/gsm8k:main", "openai/gsm8k:socratic"],
            "openai/gsm8k:main and openai/gsm8k:socratic are both called 'gsm8k'",
        ),
        (["a/rows.jsonl", "b/rows.jsonl"], "a/rows.jsonl and b/rows.jsonl are both called 'rows'"),
    ],
)
def test_two_sources_of_one_name(sources, confused, make_own):
    found = [text for text in make_own(test=sources).problems("test") if "called" in text]
    assert len(found) == bool(confused)
    assert all(confused in text for text in found)
    assert not any("called" in text for text in make_own(train=sources).problems("fit"))
    weighted = make_own(train=sources, weights={}).problems("fit")
    assert any("called" in text for text in weighted) == bool(confused)


def test_addresses_and_paths(monkeypatch):
    monkeypatch.setenv("HERE", "/here")
    monkeypatch.setenv("HOME", "/home/me")
    assert [
        is_address(text) for text in ("https://a/b.json", "http://a", "httpd/rows.json", "a/https://b")
    ] == [
        True,
        True,
        False,
        False,
    ]
    assert [local_path(text) for text in ("$HERE/a", "~/a", "${HERE}b", "https://a/b")] == [
        "/here/a",
        "/home/me/a",
        "/hereb",
        "https://a/b",
    ]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.json: cannot be read \(No such file or directory\)$"):
        list(file_rows(str(tmp_path / "gone.json")))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.json: cannot be read \(Is a directory\)$"):
        list(file_rows(str(tmp_path / "folder.json")))


# --- the formats of a file ---

ROWS = [
    {"a": "one, two", "b": 'says "hi"'},
    {"a": "two\n\nlines", "b": "Grüße 👋"},
    {"a": " spaces ", "b": ""},
    {"a": "a\u2028b\x0bc\x85d", "b": "line breaks to some"},
]


def _json(rows):
    return json.dumps(rows, ensure_ascii=False).encode()


def _jsonl(rows):
    return b"".join(_json(row) + b"\n" for row in rows)


def _csv(rows, **dialect):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows, **settings):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **settings)
    return stream.getvalue()


FORMATS = {"json": _json, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}


@pytest.fixture
def put(tmp_path):
    """``put("rows.csv", content)``: the path of a file with these bytes."""

    def store(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return store


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_are_the_same_in_every_format(suffix, put):
    path = put(f"rows.{suffix}", FORMATS[suffix](ROWS))
    assert list(file_rows(path)) == [(f"{path}, row {number}", row) for number, row in enumerate(ROWS, 1)]


def test_capitals_in_the_ending_of_a_name(put):
    assert [row for _, row in file_rows(put("rows.CSV", FORMATS["csv"](ROWS)))] == ROWS


def test_a_long_field_of_csv(put):
    rows = [{"text": "long " * 40_000}]
    assert [row for _, row in file_rows(put("rows.csv", FORMATS["csv"](rows)))] == rows


def test_parquet_whose_columns_share_a_name(put):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table([pyarrow.array(["1"]), pyarrow.array(["2"])], names=["a", "a"]), stream
    )
    with pytest.raises(
        ConfigError, match=r"rows\.parquet: expected a name of its own for each column, found a, a$"
    ):
        list(file_rows(put("rows.parquet", stream.getvalue())))


def test_parquet_that_is_not_utf_8(put):
    stream, wrong = io.BytesIO(), pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table([wrong], names=["a"]), stream)
    with pytest.raises(ConfigError, match=r"rows\.parquet: not a whole Parquet file, after 0 rows"):
        list(file_rows(put("rows.parquet", stream.getvalue())))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_of_any_format_that_is_not_there(suffix, tmp_path):
    with pytest.raises(ConfigError, match=rf"gone\.{suffix}: cannot be read"):
        list(file_rows(str(tmp_path / f"gone.{suffix}")))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(suffix, put):
    path = put(f"rows.{suffix}", b"\xef\xbb\xbf" + FORMATS[suffix](ROWS))
    assert [row for _, row in file_rows(path)] == ROWS


@pytest.mark.parametrize(
    "dialect", [{"lineterminator": "\n"}, {"lineterminator": "\r\n"}, {"quoting": csv.QUOTE_ALL}]
)
def test_dialects_of_csv(dialect, put):
    assert [row for _, row in file_rows(put("rows.csv", _csv(ROWS, **dialect)))] == ROWS


def test_rows_of_json_lines_are_lines_of_the_file(put):
    path = put("rows.jsonl", b'\r\n{"a": 1}\r\n\r\n  \r\n{"a": 2}')
    assert list(file_rows(path)) == [(f"{path}, row 2", {"a": 1}), (f"{path}, row 5", {"a": 2})]


def test_empty_lines_of_csv_are_no_rows(put):
    path = put("rows.csv", b"a,b\n\n1,2\n\n\n3,4")
    assert list(file_rows(path)) == [
        (f"{path}, row 1", {"a": "1", "b": "2"}),
        (f"{path}, row 2", {"a": "3", "b": "4"}),
    ]


def test_parquet_in_parts(put):
    rows = [
        {"number": number, "said": [{"role": "user", "content": "hi"}], "none": None} for number in range(7)
    ]
    path = put("rows.parquet", _parquet(rows, row_group_size=2))
    assert list(file_rows(path)) == [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_slices_of_every_format(suffix, put, make_own):
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(5)]
    path = put(f"rows.{suffix}", FORMATS[suffix](rows))
    examples = list(make_own(train=[f"{path}[1:3]", f"{path}[4:]"]).examples("train"))
    assert [example.answers[0] for example in examples] == [" answer 1", " answer 2", " answer 4"]
    assert [example.task for example in examples] == ["rows"] * 3


# --- files that were cut, or are no such files ---


def _said(path):
    """What is said of a file that is refused, behind its name, and the rows before."""
    rows = []
    with pytest.raises(ConfigError) as caught:
        rows += (row for _, row in file_rows(path))
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(path)


def test_json_lines_cut_anywhere_in_a_line(put):
    """Where a line is whole, what is missing cannot be seen."""
    whole = _jsonl(ROWS[:2])
    first = whole.index(b"\n")
    for end in range(1, len(whole)):
        path = put("rows.jsonl", whole[:end])
        if whole[end - 1 : end] in b"}\n":
            assert len(list(file_rows(path))) == (1 if end <= first + 1 else 2)
            continue
        said = _said(path)
        if b"\x80" <= whole[end : end + 1] < b"\xc0":
            assert said.startswith(": not UTF-8 text (unexpected end of data at byte ")
        else:
            assert said.startswith(f", row {1 if end < first else 2}: not JSON (")
            assert said.endswith("); the file ends there, without a line break: was it cut?")


def test_a_malformed_line_before_the_last_was_not_cut(put):
    assert (
        _said(put("rows.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}'))
        == ", row 2: not JSON (Expecting value, column 7)"
    )
    assert _said(put("rows.jsonl", b'{"a": 1}\n{"a": \n')) == ", row 2: not JSON (Expecting value, column 7)"


@pytest.mark.parametrize("end", [1, 12, -1])
def test_json_cut_anywhere(end, put):
    assert _said(put("rows.json", _json(ROWS)[:end])).startswith(": not JSON (")


@pytest.mark.parametrize("end", [0, 1, 4, 30, 0.3, 0.5, 0.9, -9, -8, -4, -1])
def test_parquet_cut_anywhere(end, put):
    whole = _parquet([{"text": f"row {n} " * 9} for n in range(200)], row_group_size=20)
    end = int(end * len(whole)) if isinstance(end, float) else end
    said = _said(put("rows.parquet", whole[:end]))
    assert said.startswith(": not a whole Parquet file, after 0 rows (")
    assert said.endswith("); was it cut?")


def test_parquet_whose_middle_is_broken(put):
    """The footer promises more rows than can be read; those before are whole."""
    rows = [{"text": f"row {n} " * 9} for n in range(200_000)]
    whole = _parquet(rows, row_group_size=50_000, compression="snappy", use_dictionary=False)
    middle = len(whole) * 3 // 4
    path = put("rows.parquet", whole[:middle] + b"\xff" * 2000 + whole[middle + 2000 :])
    said = _said(path)
    assert said.startswith(": not a whole Parquet file, after ")
    assert 0 < int(said.split()[7]) < len(rows)


def test_what_is_no_parquet(put):
    assert _said(put("rows.parquet", _csv(ROWS) * 9)).startswith(": not a whole Parquet file, after 0 rows (")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": expected a first line with a name for each column, found ''"),
        ("\na,b\n1,2\n", ": expected a first line with a name for each column, found ''"),
        ("a,b,a\n1,2,3\n", ": expected a first line with a name for each column, found 'a,b,a'"),
        ("a,b\n1,2\n3\n5,6\n", ", row 2 (line 3): 1 fields; expected 2, as the header has: a, b"),
        ("a,b\n1,2,3\n", ", row 1 (line 2): 3 fields; expected 2, as the header has: a, b"),
        ("a,b\n1,2\n3,4,\n", ", row 2 (line 3): 3 fields; expected 2, as the header has: a, b"),
        ('a,b\n"1\n1\n1",2\n\n3\n', ", row 2 (line 6): 1 fields; expected 2, as the header has: a, b"),
        ('a,b\n1,2\n3,"4 and', ", row 2 (line 3): not CSV (unexpected end of data)"),
        ('a,b\n1,2\n3,"4\nand\n', ", row 2 (line 4): not CSV (unexpected end of data)"),
        ('a,b\n1,2\n3,4\n5,"6"7\n', ", row 3 (line 4): not CSV (',' expected after '\"')"),
        ('a,"b\n1,2\n', ", row 1 (line 2): not CSV (unexpected end of data)"),
    ],
)
def test_what_is_no_csv(content, message, put):
    assert _said(put("rows.csv", content.encode())) == message


def test_quoted_csv_cut_anywhere_in_a_row(put):
    whole = _csv([{"a": "one, two", "b": "it's"}, ROWS[1]], quoting=csv.QUOTE_ALL)
    first, second = (
        place for place in range(len(whole)) if whole[place - 1 : place + 2] == b'"\r\n' and place > 10
    )
    for end in {*range(10, first), *range(first + 3, second)}:
        if whole[:end].endswith(b'",'):  # a last field that is empty; whoever reads it may refuse that
            continue
        said = _said(put("rows.csv", whole[:end]))
        if b"\x80" <= whole[end : end + 1] < b"\xc0":
            assert said.startswith(": not UTF-8 text (unexpected end of data at byte ")
        else:
            assert said.startswith(f", row {1 if end < first else 2} (line ")
            assert "not CSV (unexpected end of data)" in said or "1 fields; expected 2" in said


def test_text_of_another_encoding(put):
    for suffix in ("json", "jsonl", "csv"):
        path = put(f"rows.{suffix}", FORMATS[suffix](ROWS).decode().encode("utf-16"))
        assert _said(path) == ": not UTF-8 text (invalid start byte at byte 0)"


# --- rows of the hub ---


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None, "validation")),
        ("owner/name:en", ("owner/name", "en", "validation")),
        ("owner/name@dev", ("owner/name", None, "dev")),
        ("owner/name:en@dev", ("owner/name", "en", "dev")),
        ("owner/name:en-1.0@dev[:10%]", ("owner/name", "en-1.0", "dev[:10%]")),
    ],
)
def test_configuration_and_split_of_a_hub_data_set(name, asked, monkeypatch):
    found = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *names, split: found.append((*names, split)) or [{"a": 1}, {"a": 2}]
    )
    rows = list(hub_rows(name, "validation"))
    assert found == [asked]
    assert rows == [(f"{asked[0]}[{asked[2]}], row {number}", {"a": number}) for number in (1, 2)]


def test_a_hub_data_set_with_configurations_through_a_data_module(make_own, monkeypatch):
    found = []
    row = {"question": "Why?", "answer": "So."}
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *names, split: found.append((*names, split)) or [row, row, {}]
    )
    settings = {"columns": {"instruction": "question", "output": "answer"}, "validation": 1}
    data = make_own(
        train=["owner/chats:en@dev[:2]", "owner/others[:1]"], weights={"chats": 1, "others": 3}, **settings
    )
    assert data.problems("fit") == []
    assert [example.task for example in data.examples("train")] == ["chats", "chats", "others"]
    assert found == [("owner/chats", "en", "dev"), ("owner/others", None, "train")]
    data.sources["train"] = ["owner/chats:en@dev"]
    with pytest.raises(ConfigError, match=r"^owner/chats\[dev\], row 3: column 'question' is missing"):
        list(data.examples("train"))


def test_a_hub_data_set_that_cannot_be_had_says_how_configurations_are_named(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ConfigError) as caught:
        list(hub_rows("owner/name@dev", "train"))
    assert str(caught.value) == (
        "data.train: cannot fetch 'owner/name@dev' from the hub (ValueError: Config name is missing. Please pick one among the "
        "available configs: ['en', 'de']). A configuration is given as owner/name:config, another split as owner/name@split. "
        "Without network, give local files."
    )


# --- rows at a web address ---


@pytest.fixture
def web(tmp_path, monkeypatch):
    """``web.address`` serves the files below ``web.folder`` on this machine; ``web.fetched`` lists what was asked for."""
    import datasets

    fetched = []
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            fetched.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # this machine's own addresses only
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    server.address, server.folder, server.fetched = f"http://127.0.0.1:{server.server_port}", folder, fetched
    yield server
    server.shutdown()
    server.server_close()


def _put(web, name, content):
    path = web.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return f"{web.address}/{name}"


def test_a_data_dir_at_an_address(web, make_data, rows):
    """The splits of LLM-Adapters can be used where they are."""
    _put(web, "set/boolq/train.json", rows(3))
    _put(web, "set/boolq/test.json", rows(5))
    for slash in ("", "/"):
        settings = {
            "data_dir": f"{web.address}/set{slash}",
            "train": ["boolq"],
            "validation": 1,
            "test": ["boolq[:4]"],
        }
        data = make_data(answer_format="content", stage="fit", **settings)
        assert data.problems("fit") == data.problems("test") == []
        data.setup("test")
        assert [len(data.tables[split]) for split in ("train", "validation", "test")] == [2, 1, 4]
        assert set(data.tables["test"]["task"]) == {"boolq"}
        assert data.leakage()[1].of == 4
    assert sorted(web.fetched) == ["/set/boolq/test.json", "/set/boolq/train.json"]  # once each


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_at_an_address(suffix, web, make_data, rows):
    address = _put(web, f"mine.{suffix}", FORMATS[suffix](rows(4)))
    data = make_data(train=[f"{address}[:3]", "everyday[:2]"], validation=1)
    assert data.problems("fit") == []
    assert web.fetched == []  # problems are found without the network
    assert [example.task for example in data.examples("train")] == ["mine"] * 3 + ["everyday"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", '[{"instruction": "a"', r"/bad\.json: not JSON \(.*line 1"),
        ("dict.json", {"rows": []}, r"/dict\.json: expected a JSON list of rows, found dict"),
        ("bad.jsonl", '{}\n{"instruction": \n', r"/bad\.jsonl, row 1: field 'instruction' is missing"),
        ("cut.jsonl", '\n{"instruction": \n', r"/cut\.jsonl, row 2: not JSON \(.*column"),
        ("row.json", [{"instruction": "Which?"}], r"/row\.json, row 1: field 'answer' is missing"),
        ("bad.csv", "a,b\n1\n", r"/bad\.csv, row 1 \(line 2\): 1 fields; expected 2"),
        ("row.csv", "instruction,b\nWhich?,2\n", r"/row\.csv, row 1: field 'answer' is missing"),
        ("bad.parquet", "PAR1", r"/bad\.parquet: not a whole Parquet file, after 0 rows \("),
    ],
)
def test_what_is_wrong_at_an_address_is_named_by_it(name, content, message, web, make_data):
    address = _put(web, name, content)
    with pytest.raises(ConfigError, match=message) as caught:
        list(make_data(train=[address]).examples("train"))
    assert str(caught.value).startswith(address)


def test_nothing_at_an_address(web, make_data):
    data = make_data(train=["ARC-Easy"], data_dir=f"{web.address}/nowhere", validation=1)
    assert data.problems("fit") == []
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    message = str(caught.value)
    assert message.startswith(f"cannot fetch {web.address}/nowhere/ARC-Easy/train.json (")
    assert "\n" not in message


def test_nobody_at_an_address(web, make_data):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/rows.json"
        with pytest.raises(ConfigError) as caught:
            list(make_data(train=[address]).examples("train"))
    assert str(caught.value).startswith(f"cannot fetch {address} (")


def test_an_address_without_network_is_named(web, make_data, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^cannot fetch http://127\.0\.0\.1:\d+/rows\.json \(.*[Oo]ffline"):
        list(make_data(train=[f"{web.address}/rows.json"]).examples("train"))
