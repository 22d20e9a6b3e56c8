"""Tokens told apart by their gates: a closed one needs the frozen weight alone, an open one the merged weight alone.

Large products of a training step, ``2 · out · in`` operations a token each: 2 where the gate is closed (``W0 x``, ``W0ᵀ dy``),
3 where it is open (``W x``, ``Wᵀ dy`` and the gradient of the factors, ``W = W0 + W0 ⊙ BA``), 5 in between.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatera_lightning.adapters.ops import factor_gradients, hadamard_weight, in_own_dtypes, with_gated_hadamard

PAYS_FROM = 1 / 8
"""Share of decided tokens from which telling them apart pays: below it, moving rows costs what the left-out products save.

Only the time depends on it, not what is computed: a step cut up otherwise is the same step."""


class TokensByGate(NamedTuple):
    """Indices of tokens, each (n,): those with a closed gate, those in between, those with an open one."""

    closed: Tensor
    between: Tensor
    opened: Tensor


def hard_gates(g: Tensor, skip_below: float, merge_above: float) -> Tensor:
    """``γ``: 0 where ``g < skip_below``, 1 where ``g > merge_above``, else g, NaN included; a decided gate gets no gradient."""
    return torch.where(g < skip_below, 0.0, torch.where(g > merge_above, 1.0, g))


def tokens_by_gate(hard: Tensor) -> TokensByGate | None:
    """Tokens whose hard gate (tokens,) is 0, those with another, those with 1; None where fewer than an eighth are decided.

    Waits for the device once.
    """
    group = 1 - (hard == 0).to(torch.int8) + (hard == 1)  # 0 closed, 1 in between, 2 open
    order = group.argsort(stable=True)
    counts = torch.stack([(group == n).sum() for n in range(3)]).tolist()
    return TokensByGate(*order.split(counts)) if counts[0] + counts[2] >= PAYS_FROM * len(hard) else None


def partitioned_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor | None, g: Tensor, tokens: TokensByGate
) -> Tensor:
    """``W0 x + b`` for closed tokens, ``(W0 + Δ) x + b`` for open ones, ``W0 x + b + g · Δ x`` for the others.

    x (tokens, in), weight (out, in), delta (out, in) or None where all are closed, g (tokens,) -> (tokens, out).
    """
    if delta is None:
        return F.linear(x, weight, bias)
    if len(tokens.opened):
        y = x.new_empty(len(x), len(weight))
        frozen = torch.cat([tokens.closed, tokens.between])
        y[frozen] = F.linear(x[frozen], weight, bias)
        y[tokens.opened] = F.linear(x[tokens.opened], weight + delta, bias)
    else:
        y = F.linear(x, weight, bias)
    if len(tokens.between):
        n = tokens.between
        y.index_add_(0, n, F.linear(x[n] * g[n, None].to(x.dtype), delta))
    return y


class _PartitionedHadamard(torch.autograd.Function):
    """Forward and backward of the three kinds of tokens, by their hard gates."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, g: Tensor, tokens: TokensByGate
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, g, *tokens)
        flat = x.flatten(0, -2).to(weight.dtype)  # (tokens, in)
        delta = None if len(tokens.closed) == len(flat) else hadamard_weight(weight, a, b)
        with in_own_dtypes(x):
            y = partitioned_linear(flat, weight, bias, delta, g.flatten(), tokens)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g, closed, between, opened = ctx.saved_tensors
        dtype = weight.dtype
        flat, dflat, gates = x.flatten(0, -2).to(dtype), dy.flatten(0, -2).to(dtype), g.flatten()
        needs_x, _, _, needs_a, needs_b, needs_g, _ = ctx.needs_input_grad
        dx = da = db = dg = None
        updated = torch.cat([between, opened])
        if not len(updated):  # the frozen layer
            dx = torch.mm(dflat, weight).view_as(x).to(x.dtype) if needs_x else None
            return dx, None, None, torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(g), None
        delta = hadamard_weight(weight, a, b)
        t = dflat[between] @ delta  # (in between, in)
        if needs_g:
            dg = torch.zeros_like(gates).index_copy_(0, between, (flat[between] * t).sum(-1, dtype=g.dtype)).view_as(g)
        if needs_x:
            if len(opened):
                dx, frozen = torch.empty_like(flat), torch.cat([closed, between])
                dx[frozen] = dflat[frozen] @ weight
                dx[opened] = dflat[opened] @ (weight + delta)
            else:
                dx = dflat @ weight
            dx.index_add_(0, between, t.mul_(gates[between, None].to(dtype)))
            dx = dx.view_as(x).to(x.dtype)
        if needs_a or needs_b:
            factor = torch.cat([gates[between], gates.new_ones(len(opened))]).unsqueeze(1)  # (updated, 1)
            da, db = factor_gradients(dflat[updated] * factor.to(dtype), flat[updated], weight, a, b)
        return dx, None, None, da, db, dg, None


def partitioned_hadamard(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, g: Tensor, skip_below: float, merge_above: float
) -> Tensor:
    """``W0 x + b + γ · (W0 ⊙ BA) x`` with the :func:`hard_gates` γ of g (...).

    Off the exact output by at most ``max(skip_below, 1 − merge_above) · |u(x)|`` and what rounding ``W0 + W0 ⊙ BA`` to W0's
    dtype loses. The gradient is that of this function: a decided gate gets 0 in place of ``g(1−g) · dy·u(x)``.
    Shapes as in :func:`~gatera_lightning.adapters.ops.with_gated_hadamard`.
    """
    hard = hard_gates(g, skip_below, merge_above)
    tokens = tokens_by_gate(hard.detach().flatten())
    if tokens is None:
        return with_gated_hadamard(F.linear(x, weight, bias), x, weight, a, b, hard)
    return cast(Tensor, _PartitionedHadamard.apply(x, weight, bias, a, b, hard, tokens))
