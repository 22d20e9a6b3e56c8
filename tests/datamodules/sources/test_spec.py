"""Source strings: parsing, names, and ambiguous names."""

import doctest

import pytest

from gatera_lightning.datamodules.sources import spec
from gatera_lightning.datamodules.sources.spec import Source, duplicate_names, expand_path, is_url


@pytest.mark.parametrize(
    ("text", "location", "rows"),
    [
        ("ARC-Easy", "ARC-Easy", slice(None)),
        ("ARC-Easy[:300]", "ARC-Easy", slice(300)),
        ("a/b.json[:1]", "a/b.json", slice(1)),
        ("https://host/a[:2]/b.jsonl[:07]", "https://host/a[:2]/b.jsonl", slice(7)),
        ("[:5].json", "[:5].json", slice(None)),
        ("boolq[5:]", "boolq", slice(5, None)),
        ("boolq[5:30]", "boolq", slice(5, 30)),
        ("boolq[0:0]", "boolq", slice(0, 0)),
        ("boolq[:]", "boolq", slice(None)),
        # Not slices:
        ("boolq[:-5]", "boolq[:-5]", slice(None)),
        ("boolq[-5:]", "boolq[-5:]", slice(None)),
        ("boolq[5]", "boolq[5]", slice(None)),
    ],
)
def test_source_parses_slice(text, location, rows):
    assert Source.parse(text) == Source(location, rows)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ARC-Easy", "ARC-Easy"),
        ("ARC-Easy[:300]", "ARC-Easy"),
        ("rows.json", "rows"),
        ("/data/my.rows.jsonl[:5]", "my.rows"),
        ("/data/ARC-Easy/test.json", "ARC-Easy"),
        ("/data/ARC-Easy/train.jsonl", "ARC-Easy"),
        ("/data/ARC-Easy/validation.json", "ARC-Easy"),
        ("/data/ARC-Easy/testing.json", "testing"),
        ("test.json", "test"),  # there is no folder
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
def test_source_name(text, name):
    assert Source.parse(text).name == name


def test_duplicate_names_ignores_slices_of_one_location():
    assert duplicate_names(["boolq[:10]", "boolq[20:]", "piqa"]) == []
    assert duplicate_names(["a/rows.jsonl", "b/rows.jsonl", "piqa"]) == [
        "a/rows.jsonl and b/rows.jsonl have the same name, 'rows'; accepted: sources with different names"
    ]
    assert duplicate_names(["openai/gsm8k:main", "openai/gsm8k:socratic"])[0].startswith(
        "openai/gsm8k:main and openai/gsm8k:socratic have the same name, 'gsm8k'"
    )


def test_is_url():
    assert is_url("https://a/b.json")
    assert is_url("http://a")
    assert not is_url("httpd/rows.json")
    assert not is_url("a/https://b")


def test_expand_path(monkeypatch):
    monkeypatch.setenv("HERE", "/here")
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["$HERE/a", "~/a", "${HERE}b", "https://a/b", "$UNSET_VARIABLE/a"]
    expanded = ["/here/a", "/home/me/a", "/hereb", "https://a/b", "$UNSET_VARIABLE/a"]
    assert [expand_path(path) for path in paths] == expanded


def test_doctests():
    assert doctest.testmod(spec) == (0, 1)
