"""Token ids as text in which one sees what carries loss: green in a terminal, between ``⟦`` and ``⟧`` elsewhere."""

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch


def masked_text(tokenizer: PreTrainedTokenizerBase, batch: Batch, row: int, *, colour: bool) -> Text:
    """Row ``row`` of a batch, decoded, with the stretches that carry loss marked; padding is left out."""
    length = int(batch["attention_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()
    text = Text("  ")
    start = 0
    for end in range(1, length + 1):
        marked = labels[start] != IGNORE_INDEX
        if end == length or (labels[end] != IGNORE_INDEX) != marked:
            text.append_text(marked_text(tokenizer, ids[start:end], marked=marked, colour=colour))
            start = end
    return text


def marked_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, marked: bool, colour: bool) -> Text:
    """One stretch of tokens, decoded; lines after the first are indented by two."""
    piece = str(tokenizer.decode(ids)).replace("\n", "\n  ")
    if colour:
        return Text.assemble((piece, "bold green" if marked else "dim"))
    return Text(f"⟦{piece}⟧" if marked else piece)
