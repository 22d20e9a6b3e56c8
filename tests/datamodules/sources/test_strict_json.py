"""JSON that Python's parser lets pass, or fails on with other errors than the one that callers expect."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.sources.strict_json import first_invalid_element, parse_json

INVALID = {
    "duplicate_key": ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
    "duplicate_key_inside": ('{"m": [{"role": "x", "role": "y"}]}', "the key 'role' occurs twice"),
    "huge_integer": ("1" * 5_000, "an integer of 5,000 digits is too large"),
    "huge_negative_integer": (f'{{"a": -{"7" * 4_301}}}', "an integer of 4,301 digits is too large"),
    "deep_list": ("[" * 100_000, "values are nested too deeply"),
    "deep_object": ('{"a":' * 100_000, "values are nested too deeply"),
    "high_surrogate": (r'{"text": "a \ud83d b"}', r"field 'text' has \ud83d, half of a surrogate pair"),
    "low_surrogate": (r'{"text": ["\uDE00"]}', r"field 'text' has \ude00, half of a surrogate pair"),
    "swapped_surrogates": (r'"\ude00\ud83d"', r"has \ude00, half of a surrogate pair"),
    "surrogate_in_key": (r'{"\ud800": 1}', r"a key has \ud800, half of a surrogate pair"),
}


@pytest.mark.parametrize(("text", "message"), INVALID.values(), ids=INVALID)
def test_parse_json_names_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}") as caught:
        parse_json(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("text", "message"), INVALID.values(), ids=INVALID)
def test_first_invalid_element(text, message):
    assert first_invalid_element(f'  [ {{"good": 1}} ,\n"]", {text}, 4]') == 3


def test_parse_json_reads_pairs_of_surrogates():
    assert parse_json(r'"\ud83d\ude00"') == "😀"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_parse_json_reads_what_python_writes(value):
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value
