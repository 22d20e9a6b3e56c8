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
        ``tokens_per_cycle`` over blocks of ``size`` rows.
    """
    accepted = _accepted(layout, agrees)
    depths = layout.depths[layout.is_draft]
    found = {
        f"acceptance_{depth}": Mean(accepted[depths == depth].sum(), int((depths == depth).sum()))
        for depth in range(1, size + 1)
    }
    lengths = _block_lengths(layout)[layout.is_draft]
    whole = lengths == size
    blocks = int((whole & (depths == 1)).sum())
    return found | {"tokens_per_cycle": Mean(2 * blocks + accepted[whole].sum(), blocks)}


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
