"""HiRA's Hadamard update as autograd functions that rebuild the dense factor instead of saving it.

They save what the frozen layer saves anyway (its input) and the low-rank factors. A packed frozen weight is
saved packed, and unpacked once in each pass.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.adapters.kernels.autocast import autocast_disabled
from gatera_lightning.adapters.kernels.differentiation import first_order_only, transforms_are_active
from gatera_lightning.adapters.kernels.stochastic_rounding import RoundingDraw, merged_weight
from gatera_lightning.adapters.packed_weight import dense


def hadamard_weight(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute ``W0 ⊙ BA``, the dense factor of HiRA's update.

    Args:
        weight: Frozen weight W0, (out, in).
        a: Factor A, (r, in).
        b: Factor B, (out, r).

    Returns:
        The product, (out, in), in ``weight``'s dtype.
    """
    with autocast_disabled(weight):
        return torch.mm(b.to(weight.dtype), a.to(weight.dtype)).mul_(dense(weight))


@torch.library.custom_op("gatera_lightning::hadamard_weight_once", mutates_args=())
def _hadamard_weight_after(weight: Tensor, a: Tensor, b: Tensor, dependency: Tensor) -> Tensor:
    """:func:`hadamard_weight` as an operator that a compiler cannot inline or move before ``dependency``."""
    return hadamard_weight(weight, a, b)


@_hadamard_weight_after.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, dependency: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _rebuilt_hadamard_weight(weight: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """Compute ``W0 ⊙ BA`` again in the backward pass.

    A compiler that recognized the forward's product would save it instead: (out, in) for every layer.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, _hadamard_weight_after(weight, a, b, dy))
    return hadamard_weight(weight, a, b)


def add_gated_product(y: Tensor, x: Tensor, delta: Tensor, g: Tensor | None) -> Tensor:
    """Compute ``y + g · ΔW x`` with the matmul in ΔW's dtype.

    Args:
        y: Output of the frozen layer, (..., out).
        x: Input, (..., in).
        delta: ΔW, (out, in).
        g: Gate values, (...); None for 1.

    Returns:
        The sum, (..., out), in y's dtype.
    """
    with autocast_disabled(x):
        u = F.linear(x.to(delta.dtype), delta).to(y.dtype)  # (..., out)
        return y + u if g is None else torch.addcmul(y, u, g.unsqueeze(-1).to(y.dtype))


def factor_gradients(du: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of both factors, ``dA = Bᵀ dP`` and ``dB = dP Aᵀ`` with ``dP = duᵀ x ⊙ W0``.

    ``P = BA``; see theorem 1 of GateRA (arXiv 2511.17582).

    Args:
        du: Gradient of ``(W0 ⊙ BA) x``, (tokens, out).
        x: Input, (tokens, in).
        weight: Frozen weight W0, (out, in).
        a: Factor A, (r, in).
        b: Factor B, (out, r).

    Returns:
        dA (r, in) and dB (out, r), in the dtypes of the factors.
    """
    dp = torch.mm(du.t(), x).mul_(weight)  # (out, in)
    return torch.mm(b.to(dp.dtype).t(), dp).to(a.dtype), torch.mm(dp, a.to(dp.dtype).t()).to(b.dtype)


class _GatedHadamard(torch.autograd.Function):
    """``y + g · (W0 ⊙ BA) x``; saves nothing of size (out, in).

    With ``t = (W0 ⊙ BA)ᵀ dy``: ``dx = g·t`` and ``dg = x·t``, so ``u(x)`` need not be saved; dA and dB come
    from ``g·dy``.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, g: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, g)
        return add_gated_product(y, x, hadamard_weight(weight, a, b), g)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g = ctx.saved_tensors
        weight, dtype = dense(weight), weight.dtype
        needs_y, needs_x, _, needs_a, needs_b, needs_g = ctx.needs_input_grad
        du = dy.to(dtype)
        x_ = x.to(dtype)
        dx = da = db = dg = None
        if needs_x or needs_g:
            t = torch.matmul(du, _rebuilt_hadamard_weight(weight, a, b, dy))  # (..., in)
            if needs_g:
                dg = (x_ * t).sum(-1, dtype=g.dtype)
            if needs_x:
                dx = (t if g is None else t.mul_(g.unsqueeze(-1).to(dtype))).to(x.dtype)
        if needs_a or needs_b:
            if g is not None:
                du = du * g.unsqueeze(-1).to(dtype)
            da, db = factor_gradients(du.flatten(0, -2), x_.flatten(0, -2), weight, a, b)
        return dy if needs_y else None, dx, None, da, db, dg


def add_gated_hadamard(
    y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, g: Tensor | None = None
) -> Tensor:
    """Compute ``y + g · (W0 ⊙ BA) x``: HiRA's update (Huang et al., ICLR 2025) under a gate.

    The matmuls run in ``weight``'s dtype.

    Args:
        y: Output of the frozen layer, (..., out).
        x: Input, (..., in).
        weight: Frozen weight W0, (out, in); gets no gradient.
        a: Factor A, (r, in).
        b: Factor B, (out, r).
        g: Gate values, (...); None for 1.

    Returns:
        The sum, (..., out), in y's dtype.
    """
    if transforms_are_active():
        return add_gated_product(y, x, hadamard_weight(weight, a, b), g)
    return cast(Tensor, _GatedHadamard.apply(y, x, weight, a, b, g))  # type: ignore[no-untyped-call]


class _MergedHadamard(torch.autograd.Function):
    """``(W0 + W0 ⊙ BA) x + b`` and ``dx = (W0 + W0 ⊙ BA)ᵀ dy``: 3 large matmuls, where separate terms take 5.

    The merged weight is rebuilt in the backward pass, with the same rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        draw: RoundingDraw | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.draw = draw
        weight = dense(weight)
        y = F.linear(x, merged_weight(weight, hadamard_weight(weight, a, b), draw), bias)
        return y.detach()  # models may write to the output in place, which a view would not allow

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        weight = dense(weight)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            delta = _rebuilt_hadamard_weight(weight, a, b, dy)
            dx = torch.matmul(dy, merged_weight(weight, delta, ctx.draw))  # (..., in)
        if any(ctx.needs_input_grad[3:5]):
            da, db = factor_gradients(dy.flatten(0, -2), x.flatten(0, -2), weight, a, b)
        return dx, None, None, da, db, None


def merged_hadamard(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    draw: RoundingDraw | None = None,
) -> Tensor:
    """Compute ``(W0 + W0 ⊙ BA) x + b``, ungated HiRA, in one large matmul.

    Equal to the separate terms up to the rounding of the merged weight, which in 16 bits is too coarse
    without a draw, and right on average with one.

    Args:
        x: Input, (..., in), in ``weight``'s dtype.
        weight: Frozen weight W0, (out, in); gets no gradient.
        bias: Frozen bias, (out,).
        a: Factor A, (r, in).
        b: Factor B, (out, r).
        draw: Rounds the merged weight, which must then be bfloat16; None rounds to nearest.

    Returns:
        The output, (..., out).
    """
    return cast(Tensor, _MergedHadamard.apply(x, weight, bias, a, b, draw))  # type: ignore[no-untyped-call]
