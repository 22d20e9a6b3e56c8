"""Tests of readable token labels."""

import pytest
from tiny_backbone import tiny_tokenizer

from gatera_lightning.gate_analysis.token_labels import token_labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", ["a", " b"]),
        ("x\ty\n", ["x", "⇥", "y", "↵"]),
        ("\x07", ["\\x07"]),
        ("<script>", list("<script>")),
        ("é", ["⟨Ã⟩", "⟨©⟩"]),  # two bytes, neither of which is a character
    ],
)
def test_token_labels_of_text(text, expected):
    tokenizer = tiny_tokenizer()
    ids = (
        [i for c in text for i in tokenizer(c).input_ids]
        if text not in ("a b",)
        else tokenizer(text).input_ids
    )
    assert token_labels(tokenizer, ids) == expected


def test_token_labels_of_special_tokens():
    tokenizer = tiny_tokenizer()
    assert token_labels(tokenizer, [tokenizer.bos_token_id, tokenizer.eos_token_id]) == ["<|bos|>", "<|eos|>"]
