"""The total variation between two predictions through a frozen head, without storing all logits.

As in :mod:`~gatera_lightning.objectives.linear_cross_entropy`, the forward pass computes the logits of one
chunk of positions at a time, their loss, and the gradient with respect to the hidden states, which is all
that it stores.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.adapters.kernels.differentiation import first_order_only

LOGITS_PER_CHUNK = 2**24
"""Number of logits in a chunk, for each of the two predictions."""


def linear_total_variation(hidden: Tensor, expected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``½ Σ |softmax(W h + b) − softmax(W e + b)|`` with a gradient with respect to ``hidden`` only.

    Args:
        hidden: Hidden states h (n, width).
        expected: Hidden states e of the prediction to learn, (n, width).
        weight: The frozen head's weight (vocabulary, width).
        bias: Its bias (vocabulary,), or None.

    Returns:
        A scalar in fp32 or wider, from 0 to n; exactly 0 for n = 0.
    """
    loss = _LinearTotalVariation.apply(hidden, expected, weight, bias)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def total_variation(logits: Tensor, expected: Tensor) -> Tensor:
    """Return ``½ Σ |softmax(logits) − softmax(expected)|`` of two tensors (n, vocabulary), as a scalar."""
    return (_probabilities(logits) - _probabilities(expected)).abs().sum() / 2


def compare_hidden(hidden: Tensor, expected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compare two predictions of each position, without a gradient.

    Args:
        hidden: As for :func:`linear_total_variation`.
        expected: As there.
        weight: As there.
        bias: As there.

    Returns:
        (n, 2): the total variation, from 0 to 1, and 1 where the most likely token is the same, else 0.
    """
    rows = _rows_per_chunk(weight)
    found = [
        compare_logits(F.linear(h, weight, bias), F.linear(e, weight, bias))
        for h, e in zip(hidden.split(rows), expected.split(rows), strict=True)
    ]
    return torch.cat(found)


def compare_logits(logits: Tensor, expected: Tensor) -> Tensor:
    """Compare as :func:`compare_hidden` does, from two tensors (n, vocabulary)."""
    distance = (_probabilities(logits) - _probabilities(expected)).abs().sum(1) / 2
    return torch.stack([distance, (logits.argmax(1) == expected.argmax(1)).to(distance.dtype)], 1)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _rows_per_chunk(weight: Tensor) -> int:
    return max(1, LOGITS_PER_CHUNK // len(weight))


class _LinearTotalVariation(torch.autograd.Function):
    """``dh = ½ p ⊙ (sgn(p − q) − Σ sgn(p − q) p) W``, computed in forward and saved in ``hidden``'s dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, expected: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        dhidden = torch.empty_like(hidden)
        rows = _rows_per_chunk(weight)
        for h, e, gradient in zip(hidden.split(rows), expected.split(rows), dhidden.split(rows), strict=True):
            p = _probabilities(F.linear(h, weight, bias))  # (rows, vocabulary)
            sign = p - _probabilities(F.linear(e, weight, bias))
            loss += sign.abs().sum() / 2
            sign.sign_()
            mean = torch.linalg.vecdot(sign, p).unsqueeze(1)  # (rows, 1)
            torch.mm(p.mul_(sign.sub_(mean).div_(2)).to(h.dtype), weight, out=gradient)
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        return (dhidden.to(dloss.dtype) * dloss).to(dhidden.dtype), None, None, None
