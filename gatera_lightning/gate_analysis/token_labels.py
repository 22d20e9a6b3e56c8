"""Readable labels for tokens: makes white space and partial characters visible."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def token_labels(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Return one readable label for each token.

    Spaces are unchanged, line breaks and tabs become ``↵`` and ``⇥``, and other unprintable characters are
    escaped (``\\x07``). A token that is only part of a character cannot be decoded alone; its label is the
    tokenizer's name for it between ``⟨`` and ``⟩``.

    Args:
        tokenizer: The tokenizer of the model.
        token_ids: The tokens to label.
    """
    return [_label(tokenizer, token_id) for token_id in token_ids]


def _label(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return f"⟨{name}⟩"
    if name.startswith(("▁", "Ġ")) and not text.startswith(" "):
        text = " " + text  # SentencePiece drops the space before the first word of a text
    return "".join(
        _MARKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text
    )
