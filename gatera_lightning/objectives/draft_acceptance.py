"""How many drafts greedy decoding would accept, measured on given text."""

import torch
from torch import Tensor

from gatera_lightning.objectives.base import Mean
from gatera_lightning.objectives.draft_layout import DraftLayout


def acceptance(layout: DraftLayout, agrees: Tensor, size: int) -> dict[str, Mean]:
    """Measure acceptance by depth, and the tokens of a cycle of two forward passes.

    A draft is accepted if it and all drafts before it in its block are the most likely tokens of the clean
    rows. A cycle yields one token from the seed, the accepted drafts, and one from the verification.

    Args:
        layout: The draft rows.
        agrees: (n,), bool: whether the most likely token of each draft row is that of the clean row.
        size: Rows of a block.

    Returns:
        ``acceptance_1`` to ``acceptance_<size>``, each over the blocks that are so long, and
        ``tokens_per_cycle`` over blocks of ``size`` rows, by sequence.
    """
    accepted = _accepted(layout, agrees)
    depths = layout.depths[layout.is_draft]
    found = {
        f"acceptance_{depth}": mean_of_sequences(layout, accepted, depths == depth)
        for depth in range(1, size + 1)
    }
    whole = _block_lengths(layout)[layout.is_draft] == size
    drafts = mean_of_sequences(layout, accepted, whole).total
    blocks = mean_of_sequences(layout, accepted, whole & (depths == 1)).count
    return found | {"tokens_per_cycle": Mean(2 * blocks + drafts, blocks)}


def mean_of_sequences(layout: DraftLayout, values: Tensor, selected: Tensor | None = None) -> Mean:
    """Return the sums of each sequence, over all draft rows or some of them.

    Args:
        layout: The draft rows.
        values: (n,), a number for each draft row.
        selected: (n,), bool: which rows count.
    """
    sequences = layout.is_draft.nonzero()[:, 0]
    if selected is not None:
        values, sequences = values[selected], sequences[selected]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    zeros = values.new_zeros(len(layout.is_draft))
    return Mean(zeros.index_add(0, sequences, values), sequences.bincount(minlength=len(zeros)))


def _accepted(layout: DraftLayout, agrees: Tensor) -> Tensor:
    """Whether each draft and all before it in its block agree, (n,)."""
    fails = torch.zeros_like(layout.columns)
    fails[layout.is_draft] = (~agrees).to(fails)
    so_far = fails.cumsum(1)  # (batch, rows)
    before_block = ((so_far - fails) * (layout.depths == 1)).cummax(1).values
    return (so_far == before_block)[layout.is_draft]


def _block_lengths(layout: DraftLayout) -> Tensor:
    """Rows of each row's block, (batch, rows)."""
    same_block = (layout.starts.unsqueeze(2) == layout.starts.unsqueeze(1)) & layout.is_draft.unsqueeze(1)
    return same_block.sum(2)
