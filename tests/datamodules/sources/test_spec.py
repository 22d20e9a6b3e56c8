"""Source strings: parsing, names, and ambiguous names."""

import doctest
import re

import pytest

from gatera_lightning.datamodules.sources import spec
from gatera_lightning.datamodules.sources.spec import (
    Source,
    data_suffix,
    duplicate_names,
    expand_path,
    is_url,
    looks_like_path,
)


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
        ("boolq[:٣]", "boolq[:٣]", slice(None)),
        ("boolq[:1" + "0" * 18 + "]", "boolq[:1" + "0" * 18 + "]", slice(None)),
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
        ("mine.jsonl.gz[:9]", "mine"),
        ("/data/boolq/test.tsv", "boolq"),
        ("https://host/mine.csv?download=true", "mine"),
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


@pytest.mark.parametrize(
    ("rows", "total", "result"),
    [
        ("[:5]", 5, ""),
        ("[:5]", 9, ""),
        ("", 3, ""),
        ("[:5]", 3, "'a[:5]' goes beyond the 3 rows of a; 3 are used"),
        ("[2:2000]", 1800, "'a[2:2000]' goes beyond the 1,800 rows of a; 1,798 are used"),
        ("[3:]", 3, ValueError("'a[3:]' selects no rows; a has 3")),
        ("[7:9]", 3, ValueError("'a[7:9]' selects no rows; a has 3")),
        ("[:9]", 0, ValueError("a has no rows")),
    ],
)
def test_check_size_counts(rows, total, result):
    source = Source.parse(f"a{rows}")
    if isinstance(result, str):
        assert source.check_size(total) == result
    else:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(result))}$"):
            source.check_size(total)


@pytest.mark.parametrize(
    ("location", "suffix", "path"),
    [
        ("rows.tsv.GZ", ".tsv.gz", True),
        ("owner/name-1.5", "", False),
        ("owner/name.en:conf@split/a.b", "", False),
        ("owner/rows.xlsx", "", True),
        ("a/b/c", "", True),
        ("./rows", "", True),
        ("/rows", "", True),
        ("owner/rows.jsonl.zst", "", True),
    ],
)
def test_paths_are_told_from_hub_datasets(location, suffix, path):
    assert data_suffix(location) == suffix
    assert looks_like_path(location) is path or suffix


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
    assert doctest.testmod(spec) == (0, 2)
