"""Show which tokens of a batch are supervised: green in a terminal, between ``⟦`` and ``⟧`` elsewhere."""

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch


def highlight_supervised(tokenizer: PreTrainedTokenizerBase, batch: Batch, row: int, *, color: bool) -> Text:
    """Decode a row of a batch without its padding, and highlight its supervised tokens.

    Args:
        tokenizer: The tokenizer of the batch.
        batch: The batch.
        row: Index of the row.
        color: Highlight with color instead of brackets.
    """
    length = int(batch["attention_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()
    text = Text("  ")
    start = 0
    for end in range(1, length + 1):
        supervised = labels[start] != IGNORE_INDEX
        if end == length or (labels[end] != IGNORE_INDEX) != supervised:
            text.append_text(decode_span(tokenizer, ids[start:end], highlighted=supervised, color=color))
            start = end
    return text


def decode_span(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], *, highlighted: bool, color: bool
) -> Text:
    """Decode a span of tokens, highlighted or dimmed; lines after the first are indented by two spaces."""
    text = str(tokenizer.decode(ids)).replace("\n", "\n  ")
    if color:
        return Text.assemble((text, "bold green" if highlighted else "dim"))
    return Text(f"⟦{text}⟧" if highlighted else text)
