"""Words of texts in any script, compared with the rules of rouge-score and ParlAI for ASCII."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from gatera_lightning.evaluation.words import normalized_tokens, spaced, words

ASCII = st.text(string.ascii_letters + string.digits + string.punctuation + string.whitespace)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ASCII)
def test_ascii_words_are_those_of_rouge_score_and_parlai(text):
    assert words(text) == tokenize(text, stemmer=None)
    separated = re.sub(r"[!\"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_']", " ", text.lower())
    assert normalized_tokens(text) == [w for w in separated.split() if w not in ("a", "an", "the")]
    assert spaced(text) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_words_of_any_text_are_stable(text):
    """Splitting what was split changes nothing, and no word is empty."""
    found = words(text)
    assert all(found)
    assert words(" ".join(found)) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Crème brûlée", ["crème", "brûlée"]),
        ("cre\u0300me", ["crème"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("co\u00adoperate", ["cooperate"]),
        ("ກາ\u200bງ", ["ກ", "າ", "ງ"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("が・カ", ["が", "カ"]),
        ("2024年に", ["2024", "年", "に"]),
        ("ปี ๒๕๖๗", ["ปี", "๒๕๖๗"]),
        ("한국어는 좋다", ["한국어는", "좋다"]),
        ("snake_case", ["snake", "case"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
        ("❤️ ok", ["ok"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I have a dog; it's THE best!", ["i", "have", "dog", "it", "s", "best"]),
        ("another theme, an ant", ["another", "theme", "ant"]),
        ("what_is-this (a|b)?", ["what", "is", "this", "b"]),
        (" . the\t\n", []),
        ("café – 3.5", ["café", "–", "3", "5"]),
        ("“Hi” 😀", ["“hi”", "😀"]),
        ("你好，世界", ["你", "好", "世", "界"]),
        ("مرحبا، دنيا؟", ["مرحبا", "دنيا"]),
    ],
)
def test_normalized_tokens_drop_punctuation_and_articles(text, tokens):
    assert normalized_tokens(text) == tokens
