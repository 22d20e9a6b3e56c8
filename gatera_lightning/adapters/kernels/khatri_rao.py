"""ABBA's update in its Khatri–Rao form, with factors that the backward pass builds again."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.adapters.kernels.differentiation import first_order_only


def khatri_rao_factors(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Return A′ (r₁r₂, in) and B′ (out, r₁r₂) with ``B′A′ = (B₁A₁) ⊙ (B₂A₂)``.

    Args:
        a1: A₁, (r₁, in).
        b1: B₁, (out, r₁).
        a2: A₂, (r₂, in).
        b2: B₂, (out, r₂).
    """
    a = a1.unsqueeze(1) * a2  # (r1, r2, in)
    b = b1.unsqueeze(2) * b2.unsqueeze(1)  # (out, r1, r2)
    return a.flatten(0, 1), b.flatten(1, 2)


class _KhatriRaoUpdate(torch.autograd.Function):
    """``s · g · B′ A′ x``; saves x, ``A′x`` and the four factors, of which A′ and B′ are built again.

    A′ and B′ have r₁r₂ rows and columns, r/4 times as many elements as the four factors of rank r/2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        scale: float,
        g: Tensor | None,
    ) -> Tensor:
        a, b = (factor.to(x.dtype) for factor in khatri_rao_factors(a1, b1, a2, b2))
        down = F.linear(x, a)  # (..., r1·r2)
        ctx.scale = scale
        ctx.save_for_backward(x, down, a1, b1, a2, b2, g)
        return F.linear(down * _factor(down, scale, g), b)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        x, down, a1, b1, a2, b2, g = ctx.saved_tensors
        a, b = (factor.to(x.dtype) for factor in khatri_rao_factors(a1, b1, a2, b2))
        factor = _factor(down, ctx.scale, g)
        d_scaled = torch.matmul(du, b)  # (..., r1·r2)
        d_down = d_scaled * factor
        rank = len(a1), len(a2)
        da = torch.mm(d_down.flatten(0, -2).t(), x.flatten(0, -2)).to(a1.dtype).unflatten(0, rank)
        scaled = (down * factor).flatten(0, -2)
        db = torch.mm(du.flatten(0, -2).t(), scaled).to(b1.dtype).unflatten(1, rank)  # (out, r1, r2)
        dg = None
        if g is not None and ctx.needs_input_grad[6]:
            dg = ctx.scale * (d_scaled * down).sum(-1, dtype=g.dtype)
        return (
            torch.matmul(d_down, a) if ctx.needs_input_grad[0] else None,
            (da * a2).sum(1),
            (db * b2.unsqueeze(1)).sum(2),
            (da * a1.unsqueeze(1)).sum(0),
            (db * b1.unsqueeze(2)).sum(1),
            None,
            dg,
        )


def _factor(down: Tensor, scale: float, g: Tensor | None) -> Tensor | float:
    return scale if g is None else (scale * g).unsqueeze(-1).to(down.dtype)


def khatri_rao_update(
    x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, *, scale: float, g: Tensor | None = None
) -> Tensor:
    """Compute ``s · g · ((B₁A₁) ⊙ (B₂A₂)) x``, without second derivatives.

    Args:
        x: Input, (..., in).
        a1: A₁, (r₁, in).
        b1: B₁, (out, r₁).
        a2: A₂, (r₂, in).
        b2: B₂, (out, r₂).
        scale: s.
        g: Gate values, (...); None for 1.

    Returns:
        The update, (..., out), in x's dtype.
    """
    return cast(Tensor, _KhatriRaoUpdate.apply(x, a1, b1, a2, b2, scale, g))  # type: ignore[no-untyped-call]
