"""The products that autograd would compute wastefully: the Hadamard update, gated or merged, and the gate's logit.

They save what the frozen layer saves anyway (the input and the small factors) and rebuild the rest in backward.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatera_lightning.adapters.kernels.autocast import autocast_disabled


def hadamard_weight(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W0 ⊙ (B A)`` in ``weight``'s dtype; weight (out, in), a (r, in), b (out, r)."""
    with autocast_disabled(weight):
        return torch.mm(b.to(weight.dtype), a.to(weight.dtype)).mul_(weight)


@torch.library.custom_op("gatera_lightning::hadamard_weight_once", mutates_args=())
def hadamard_weight_once(weight: Tensor, a: Tensor, b: Tensor, there: Tensor) -> Tensor:
    """:func:`hadamard_weight`, which a compiler cannot compute before ``there`` is, nor look into."""
    return hadamard_weight(weight, a, b)


@hadamard_weight_once.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, there: Tensor) -> Tensor:
    return torch.empty_like(weight)


def rebuilt_hadamard_weight(weight: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """``W0 ⊙ (B A)`` for backward. A compiler that saw the forward's product again would keep that one: (out, in) a layer."""
    compiling = torch.compiler.is_compiling()
    return (
        cast(Tensor, hadamard_weight_once(weight, a, b, dy)) if compiling else hadamard_weight(weight, a, b)
    )


def add_gated_product(y: Tensor, x: Tensor, delta: Tensor, g: Tensor | None) -> Tensor:
    """``y + g · Δ x``, the product in Δ's dtype; y (..., out), x (..., in), delta (out, in), g (...) or None for 1."""
    with autocast_disabled(x):
        u = F.linear(x.to(delta.dtype), delta).to(y.dtype)  # (..., out)
        return y + u if g is None else torch.addcmul(y, u, g.unsqueeze(-1).to(y.dtype))


def factor_gradients(du: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``dA = Bᵀ dP`` and ``dB = dP Aᵀ``, of ``dP = duᵀ x ⊙ W0`` for ``P = BA`` (GateRA, theorem 1); du (n, out), x (n, in)."""
    dp = torch.mm(du.t(), x).mul_(weight)  # (out, in)
    return torch.mm(b.to(dp.dtype).t(), dp).to(a.dtype), torch.mm(dp, a.to(dp.dtype).t()).to(b.dtype)


class _GatedHadamard(torch.autograd.Function):
    """``y + g · (W0 ⊙ BA) x``. Nothing of size out·in survives the forward: the dense factor is rebuilt in backward.

    With ``t = (W0 ⊙ BA)ᵀ dy``: ``dx = g·t``, ``dg = x·t`` (so the ungated update need not be kept); dA and dB of ``g·dy``.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, g: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, g)
        return add_gated_product(y, x, hadamard_weight(weight, a, b), g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g = ctx.saved_tensors
        dtype = weight.dtype
        needs_y, needs_x, _, needs_a, needs_b, needs_g = ctx.needs_input_grad
        du = dy.to(dtype)
        x_ = x.to(dtype)
        dx = da = db = dg = None
        if needs_x or needs_g:
            t = torch.matmul(du, rebuilt_hadamard_weight(weight, a, b, dy))  # (..., in)
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
    """``y + g · (W0 ⊙ BA) x``, HiRA's update (Huang et al., ICLR 2025) under GateRA's gate (``W' = (g·BA + 1) ⊙ W0``).

    Shapes: y (..., out), x (..., in), weight (out, in) frozen, a (r, in), b (out, r), g (...) or None for 1 -> (..., out).
    The products run in ``weight``'s dtype. ``weight`` gets no gradient.
    """
    return cast(Tensor, _GatedHadamard.apply(y, x, weight, a, b, g))


class _MergedHadamard(torch.autograd.Function):
    """``(W0 + W0 ⊙ BA) x + b``, and ``dx = (W0 + W0 ⊙ BA)ᵀ dy``: 3 large products where the parts apart take 5.

    The merged weight is not kept either.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(
            x, hadamard_weight(weight, a, b).add_(weight), bias
        ).detach()  # a view could not be written to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, rebuilt_hadamard_weight(weight, a, b, dy).add_(weight))  # (..., in)
        if any(ctx.needs_input_grad[3:]):
            da, db = factor_gradients(dy.flatten(0, -2), x.flatten(0, -2), weight, a, b)
        return dx, None, None, da, db


def merged_hadamard(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``(W0 + W0 ⊙ BA) x + b``, ungated HiRA in one product; up to rounding, which bf16 would not forgive.

    Shapes: x (..., in) and weight (out, in), frozen, of one dtype, bias (out,), a (r, in), b (out, r) -> (..., out).
    """
    return cast(Tensor, _MergedHadamard.apply(x, weight, bias, a, b))
