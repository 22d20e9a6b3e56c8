"""Block-wise HiRA: an independent low-rank factor for every block of the weight (BoHA, arXiv 2509.21637)."""

from typing import Any

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.updates.hira import HiRA


class BlockHiRA(HiRA):
    """``u(x) = (W0 ⊙ P) x``, P a grid of n × n blocks ``B_ij A_ij`` of rank r/n each.

    As many parameters as HiRA of rank r, but P has a rank of up to n·r. A_ij is the block (i, j) of ``a``,
    (r/n, in/n), and B_ij that of ``b``, (out/n, r/n).
    """

    name = "block_hira"
    formula = "(W0 ⊙ P) x, P of blocks x blocks low-rank blocks of rank/blocks each"
    extra_settings = ("blocks",)

    def __init__(self, base: nn.Linear, *, blocks: int, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.blocks = blocks

    @classmethod
    def rank_problem(cls, rank: int, **settings: Any) -> str | None:
        """Describe why a rank does not suit; None if it is a multiple of the number of blocks."""
        blocks = settings["blocks"]
        return (
            None if rank % blocks == 0 else f"update 'block_hira' has blocks {blocks}; accepted: a multiple"
        )

    @classmethod
    def size_problem(cls, in_features: int, out_features: int, **settings: Any) -> str | None:
        """Describe why a layer's size does not suit; None if both sides are multiples of the blocks."""
        blocks = settings["blocks"]
        if in_features % blocks == 0 == out_features % blocks:
            return None
        return f"{blocks} does not divide both sides"

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A′ (n·r, in) and B′ (out, n·r) with ``B′A′ = P``, which are zero outside of their blocks.

        The inner index counts the blocks (i, j) and the rank within each. A′ has A_ij in the columns of j,
        and B′ has B_ij in the rows of i.
        """
        n = self.blocks
        a = self.a.unflatten(0, (n, -1)).unflatten(2, (n, -1))  # (i, rank, j, in/n)
        b = self.b.unflatten(0, (n, -1)).unflatten(2, (n, -1))  # (i, out/n, j, rank)
        wide_a = torch.diag_embed(a.movedim(2, -1))  # (i, rank, in/n, j, j')
        wide_b = torch.diag_embed(b.movedim(0, -1))  # (out/n, j, rank, i, i')
        return (
            wide_a.permute(0, 3, 1, 4, 2).flatten(0, 2).flatten(1, 2),  # (i, j, rank | j', in/n)
            wide_b.permute(3, 0, 4, 1, 2).flatten(0, 1).flatten(1, 3),  # (i, out/n | i', j, rank)
        )
