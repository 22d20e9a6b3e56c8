"""Gradients for gate values that a rule has rounded to 0 or 1."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RoundedGates(NamedTuple):
    """Rounded gate values with the gradient of the values before."""

    values: Tensor
    """The rounded values, (...)."""

    graded: Tensor
    """Indices into the flattened tokens of those whose gradient is used, (n,)."""


def straight_through(rounded: Tensor, soft: Tensor, share: float) -> RoundedGates:
    """Give rounded gates the gradient of the soft ones: that of every token, or an estimate from a share.

    ``γ = rounded + m · (soft − sg(soft))``, with m = 1 for every token, or m = n/k for k of the n tokens that
    are drawn without replacement, and 0 for the others. The expected gradient is the same for every share.
    The draw uses the default generator of the device.

    Args:
        rounded: Gate values, (...), usually 0 or 1.
        soft: The values before rounding, (...), part of the autograd graph.
        share: The share k/n of the tokens, in (0, 1]; at least one token is drawn.
    """
    tokens = soft.numel()
    if share == 1:
        graded = torch.arange(tokens, device=soft.device)
        return RoundedGates(rounded + (soft - soft.detach()), graded)
    drawn = math.ceil(share * tokens)
    graded = torch.randperm(tokens, device=soft.device)[:drawn]
    weight = soft.new_zeros(tokens).index_fill_(0, graded, tokens / max(1, drawn)).view_as(soft)
    return RoundedGates(rounded + weight * (soft - soft.detach()), graded)


def share_problem(share: object) -> list[str]:
    """Return a message if ``gradient_share`` is not a share above 0 and at most 1; else an empty list."""
    if isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1:
        return []
    return [f"adapter.gate.gradient_share: {share!r}; accepted: a share of the tokens above 0 and at most 1"]
