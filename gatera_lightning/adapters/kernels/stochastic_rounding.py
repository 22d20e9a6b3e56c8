"""Stochastic rounding to bfloat16: right on average, where rounding to nearest loses every small change.

A bfloat16 number has 8 significant bits, so ``W0 + W0 ⊙ BA`` rounded to nearest is W0 itself wherever
``|BA|`` is below about 0.3 %.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_DROPPED_BITS = 16  # of a float32 number, whose upper half is a bfloat16 number


class RoundingDraw(NamedTuple):
    """Random integers that decide which numbers of a matrix are rounded up.

    Entry (i, j) is rounded by ``(rows[i] + columns[j]) mod 2¹⁶``, uniform for every entry and independent for
    any two. The rounding of ``y = W x`` therefore has the mean and the variance that independent draws would
    give it, from out + in integers instead of out · in.
    """

    rows: Tensor
    """(out,), int16."""

    columns: Tensor
    """(in,), int16."""


def draw_rounding(weight: Tensor) -> RoundingDraw:
    """Draw from the default generator of the device of ``weight``, (out, in)."""
    rows, columns = (
        torch.randint(-(2**15), 2**15, (size,), dtype=torch.int16, device=weight.device)
        for size in weight.shape
    )
    return RoundingDraw(rows, columns)


def merges_accurately(weight: Tensor, draw: RoundingDraw | None) -> bool:
    """Return whether ``W0 + ΔW`` in W0's dtype can replace the two terms: 16 bits need a draw."""
    return draw is not None or weight.dtype.itemsize >= 4


def merged_weight(weight: Tensor, delta: Tensor, draw: RoundingDraw | None) -> Tensor:
    """Compute ``W0 + ΔW``, (out, in), in W0's dtype: rounded to nearest, or by a draw if there is one."""
    return weight + delta if draw is None else stochastically_rounded_sum(weight, delta, draw)


def stochastically_rounded_sum(weight: Tensor, delta: Tensor, draw: RoundingDraw) -> Tensor:
    """Round ``W + Δ`` to one of its two neighbors in bfloat16, with the probability that makes it unbiased.

    ``E[result] = W + Δ``: a number is rounded up with the probability ``(value − lower) / (upper − lower)``.

    Args:
        weight: W, (out, in), bfloat16.
        delta: Δ, (out, in), bfloat16.
        draw: What :func:`draw_rounding` has drawn; the same draw gives the same result.

    Returns:
        The rounded sum, (out, in), bfloat16.
    """
    exact = weight.float().add_(delta)
    # int16 sums wrap around, which is the mod; the last term makes them start at 0.
    uniform = draw.rows.unsqueeze(1) + draw.columns  # (out, in)
    bits = exact.view(torch.int32).add_(uniform).add_(2 ** (_DROPPED_BITS - 1))
    return (bits >> _DROPPED_BITS).to(torch.int16).view(torch.bfloat16)
