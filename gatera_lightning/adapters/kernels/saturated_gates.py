"""Tokens told apart by their gates: a closed one needs the frozen weight alone, an open one the merged weight alone.

Large products of a training step, ``2 · out · in`` operations a token each: 2 where the gate is closed (``W0 x``, ``W0ᵀ dy``),
3 where it is open (``W x``, ``Wᵀ dy`` and the gradient of the factors, ``W = W0 + W0 ⊙ BA``), 5 in between.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatera_lightning.adapters.kernels.autocast import autocast_disabled
from gatera_lightning.adapters.kernels.hadamard import (
    add_gated_hadamard,
    factor_gradients,
    hadamard_weight,
)

PAYS_FROM = 1 / 8
"""Share of decided tokens from which telling them apart pays: below it, moving rows costs what the left-out products save.

Only the time depends on it, not what is computed: a step cut up otherwise is the same step."""


class TokensByGate(NamedTuple):
    """An order of the tokens in which those with a closed gate come first, those with an open one last, (tokens,)."""

    order: Tensor
    back: Tensor
    """Where each token stands in ``order``."""

    closed: int
    """Tokens with a closed gate."""

    frozen: int
    """These and the tokens in between: all that need the frozen weight's own product."""


def hard_gates(g: Tensor, skip_below: float, merge_above: float) -> Tensor:
    """``γ``: 0 where ``g < skip_below``, 1 where ``g > merge_above``, else g, NaN included; a decided gate gets no gradient."""
    return torch.where(g < skip_below, 0.0, torch.where(g > merge_above, 1.0, g))


def tokens_by_gate(hard: Tensor) -> TokensByGate | None:
    """Tokens sorted by their hard gates (tokens,): 0, between, 1; None where fewer than an eighth are 0 or 1.

    Waits for the device once.
    """
    group = 1 - (hard == 0).to(torch.int8) + (hard == 1)  # 0 closed, 1 in between, 2 open
    order = group.argsort(stable=True)
    closed, frozen = torch.stack([(group < 1).sum(), (group < 2).sum()]).tolist()
    if closed + len(hard) - frozen < PAYS_FROM * len(hard):
        return None
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return TokensByGate(order, back, closed, frozen)


class _SkippingHadamard(torch.autograd.Function):
    """The frozen layer for all tokens, and the update of those ``between``: where no token is open, only theirs are moved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        between: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, g, between)
        flat = x.flatten(0, -2).to(weight.dtype)  # (tokens, in)
        with autocast_disabled(x):
            y = F.linear(flat, weight, bias)
            if len(between):
                gated = flat.index_select(0, between).mul_(_column(g, between, y.dtype))
                y.index_add_(0, between, gated @ hadamard_weight(weight, a, b).t())
            return y.unflatten(0, x.shape[:-1]).detach()  # a view could not be written to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g, between = ctx.saved_tensors
        dtype = weight.dtype
        needs_x, _, _, needs_a, needs_b, needs_g, _ = ctx.needs_input_grad
        dx = da = db = dg = None
        if needs_x:
            dx = torch.matmul(dy.to(dtype), weight)  # (..., in)
        if not len(between):
            return (
                _in(x.dtype, dx),
                None,
                None,
                torch.zeros_like(a),
                torch.zeros_like(b),
                torch.zeros_like(g),
                None,
            )
        rows = x.flatten(0, -2).to(dtype).index_select(0, between)  # (between, in)
        du = dy.flatten(0, -2).to(dtype).index_select(0, between)  # (between, out)
        t = du @ hadamard_weight(weight, a, b)  # (between, in)
        factor = _column(g, between, dtype)
        if needs_g:
            dg = _gate_gradient(g, between, rows, t)
        if dx is not None:
            dx.view(-1, dx.shape[-1]).index_add_(0, between, t.mul_(factor))
        if needs_a or needs_b:
            da, db = factor_gradients(du.mul_(factor), rows, weight, a, b)
        return _in(x.dtype, dx), None, None, da, db, dg, None


class _PartitionedHadamard(torch.autograd.Function):
    """Forward and backward of the three kinds of tokens, by their hard gates.

    Rows are moved whole, by index_select: indexing would take several times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        tokens: TokensByGate,
    ) -> Tensor:
        order, back, closed, frozen = tokens
        ctx.save_for_backward(x, weight, a, b, g, order, back)
        ctx.closed, ctx.frozen = closed, frozen
        with autocast_disabled(x):
            delta = hadamard_weight(weight, a, b)
            rows = x.flatten(0, -2).to(weight.dtype).index_select(0, order)  # (tokens, in)
            y = rows.new_empty(len(rows), len(weight))
            y[:frozen] = F.linear(rows[:frozen], weight, bias)
            y[frozen:] = F.linear(rows[frozen:], weight + delta, bias)
            between = slice(closed, frozen)
            gated = rows[between] * _column(g, order[between], rows.dtype)
            torch.addmm(
                y[between], gated, delta.t(), out=y[between]
            )  # addmm_ would not be counted by FlopCounterMode
            return y.index_select(0, back).unflatten(0, x.shape[:-1]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g, order, back = ctx.saved_tensors
        closed, frozen, dtype = ctx.closed, ctx.frozen, weight.dtype
        needs_x, _, _, needs_a, needs_b, needs_g, _ = ctx.needs_input_grad
        dx = da = db = dg = None
        rows = x.flatten(0, -2).to(dtype).index_select(0, order)  # (tokens, in)
        du = dy.flatten(0, -2).to(dtype).index_select(0, order)  # (tokens, out)
        delta = hadamard_weight(weight, a, b)
        between = slice(closed, frozen)
        factor = _column(g, order[between], dtype)
        t = du[between] @ delta  # (in between, in)
        if needs_g:
            dg = _gate_gradient(g, order[between], rows[between], t)
        if needs_x:
            sorted_dx = torch.empty_like(rows)
            torch.mm(du[:frozen], weight, out=sorted_dx[:frozen])
            torch.mm(du[frozen:], weight + delta, out=sorted_dx[frozen:])
            sorted_dx[between].addcmul_(t, factor)
            dx = x.new_empty(x.shape, dtype=dtype)  # itself no view: then autograd may add to it in place
            torch.index_select(sorted_dx, 0, back, out=dx.view(rows.shape))
        if needs_a or needs_b:
            du[between] *= factor
            da, db = factor_gradients(du[closed:], rows[closed:], weight, a, b)
        return _in(x.dtype, dx), None, None, da, db, dg, None


def _column(g: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The gates of some tokens (n,) as (n, 1)."""
    return g.flatten().index_select(0, tokens).unsqueeze(1).to(dtype)


def _gate_gradient(g: Tensor, tokens: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    """``dg = x·t`` of some tokens (n,), 0 of all others; rows and t (n, in)."""
    of_gates = (rows * t).sum(-1, dtype=g.dtype)
    return g.new_zeros(g.numel()).index_copy_(0, tokens, of_gates).view_as(g)


def _in(dtype: torch.dtype, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def partitioned_hadamard(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    skip_below: float,
    merge_above: float,
) -> Tensor:
    """``W0 x + b + γ · (W0 ⊙ BA) x`` with the :func:`hard_gates` γ of g (...).

    Off the exact output by at most ``max(skip_below, 1 − merge_above) · |u(x)|`` and what rounding ``W0 + W0 ⊙ BA`` to W0's
    dtype loses. The gradient is that of this function: a decided gate gets 0 in place of ``g(1−g) · dy·u(x)``.
    Shapes as in :func:`~gatera_lightning.adapters.kernels.hadamard.add_gated_hadamard`.
    """
    hard = hard_gates(g, skip_below, merge_above)
    tokens = tokens_by_gate(hard.detach().flatten())
    if tokens is None:
        return add_gated_hadamard(F.linear(x, weight, bias), x, weight, a, b, hard)
    if tokens.frozen == len(tokens.order):
        return cast(
            Tensor, _SkippingHadamard.apply(x, weight, bias, a, b, hard, tokens.order[tokens.closed :])
        )
    return cast(Tensor, _PartitionedHadamard.apply(x, weight, bias, a, b, hard, tokens))
