"""Tokens as people can read them: white space and bytes that are no text by themselves made visible."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """One label a token.

    A space stays a space, line breaks and tabs become ``↵`` and ``⇥``, other unprintable characters ``\\x07``. A token that is
    a part of a character, which cannot be decoded alone, becomes the tokenizer's name for it between ``⟨`` and ``⟩``.
    """
    return [_label(tokenizer, number) for number in ids]


def _label(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
    name = str(tokenizer.convert_ids_to_tokens(number))
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return f"⟨{name}⟩"
    if name.startswith(("▁", "Ġ")) and not text.startswith(
        " "
    ):  # SentencePiece drops the space of a first word
        text = " " + text
    return "".join(
        _MARKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text
    )
