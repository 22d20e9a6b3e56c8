"""HiRA's gated update for tokens with saturated gates, which need only the frozen or only the merged weight.

Large matmuls of a training step, each ``2 · out · in`` FLOPs per token: 2 if the gate is closed (``W0 x``,
``W0ᵀ dy``), 3 if it is open (``W x``, ``Wᵀ dy`` and the factors' gradient, with ``W = W0 + W0 ⊙ BA``), and 5
in between. The gradient of a saturated gate takes one more, for the tokens that need it. In 16 bits, W is
accurate only with a draw that rounds it; without one, open tokens take 5.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.adapters.kernels.autocast import autocast_disabled, matmul_dtype
from gatera_lightning.adapters.kernels.differentiation import first_order_only
from gatera_lightning.adapters.kernels.hadamard import (
    add_gated_hadamard,
    factor_gradients,
    hadamard_weight,
)
from gatera_lightning.adapters.kernels.stochastic_rounding import (
    RoundingDraw,
    merged_weight,
    merges_accurately,
)
from gatera_lightning.adapters.packed_weight import dense

MIN_SATURATED_SHARE = 1 / 8
"""Share of tokens with saturated gates below which sorting the tokens costs more than it saves.

It affects only the time: the result is the same.
"""


class TokensByGate(NamedTuple):
    """The tokens sorted by their gates: first the closed ones, then those in between, then the open ones."""

    order: Tensor
    """Indices that sort the tokens, (tokens,)."""

    inverse: Tensor
    """Position of each token in ``order``, (tokens,)."""

    closed: int
    """Number of tokens with a closed gate."""

    not_open: int
    """Number of tokens with a closed gate or one in between: those that need the frozen weight's product."""


def hard_gates(g: Tensor, skip_below: float, merge_above: float) -> Tensor:
    """Round saturated gates to 0 or 1.

    Args:
        g: Gate values, of any shape; NaN is left as it is.
        skip_below: Values below this become 0, without gradient.
        merge_above: Values above this become 1, without gradient.

    Returns:
        The gates γ, of the same shape.
    """
    return torch.where(g < skip_below, 0.0, torch.where(g > merge_above, 1.0, g))


def tokens_by_gate(hard: Tensor, *, merges: bool = True) -> TokensByGate | None:
    """Sort the tokens by their gates; synchronizes with the device once.

    Args:
        hard: Gate values, (tokens,), some of which are exactly 0 or 1, as from :func:`hard_gates`.
        merges: Whether open tokens can use a merged weight; else they are among those in between.

    Returns:
        The sorted tokens; None if fewer than ``MIN_SATURATED_SHARE`` of them save a matmul.
    """
    group = 1 - (hard == 0).to(torch.int8)  # 0 closed, 1 in between, 2 open
    if merges:
        group += hard == 1
    order = group.argsort(stable=True)
    closed, not_open = torch.stack([(group < 1).sum(), (group < 2).sum()]).tolist()
    if closed + len(hard) - not_open < MIN_SATURATED_SHARE * len(hard):
        return None
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return TokensByGate(order, inverse, closed, not_open)


class _SkippingHadamard(torch.autograd.Function):
    """Adds the update of the tokens ``between`` to the frozen layer's output, for batches without open gates.

    Only these tokens are gathered; the others stay in place.
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
        between: Tensor,
        graded: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, g, between, graded)
        weight = dense(weight)
        flat = x.flatten(0, -2).to(weight.dtype)  # (tokens, in)
        with autocast_disabled(x):
            y = F.linear(flat, weight, bias)
            if len(between):
                gated = flat.index_select(0, between).mul_(_column(g, between, y.dtype))
                y.index_add_(0, between, gated @ hadamard_weight(weight, a, b).t())
            # Detached because models may write to the output in place, which a view would not allow.
            return y.view(*x.shape[:-1], len(weight)).detach()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g, between, graded = ctx.saved_tensors
        weight, dtype = dense(weight), weight.dtype
        needs_x, _, _, needs_a, needs_b, needs_g, *_ = ctx.needs_input_grad
        dx = None
        if needs_x:
            dx = torch.matmul(dy.to(dtype), weight)  # (..., in)
        da, db, dg = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(g)
        is_graded = needs_g and graded is not None
        if not len(between) and not is_graded:
            return _cast(dx, x.dtype), None, None, da, db, dg, None, None
        inputs, gradients = x.flatten(0, -2).to(dtype), dy.flatten(0, -2).to(dtype)  # (tokens, in), (…, out)
        delta = hadamard_weight(weight, a, b)
        if is_graded:
            _set_graded_gradient(dg, graded, inputs, gradients, delta)
        if len(between):
            rows, du = inputs.index_select(0, between), gradients.index_select(0, between)
            t = du @ delta  # (between, in)
            factor = _column(g, between, dtype)
            _set_gate_gradient(dg, between, rows, t)
            if dx is not None:
                dx.view(-1, dx.shape[-1]).index_add_(0, between, t.mul_(factor))
            if needs_a or needs_b:
                da, db = factor_gradients(du.mul_(factor), rows, weight, a, b)
        return _cast(dx, x.dtype), None, None, da, db, dg, None, None


class _PartitionedHadamard(torch.autograd.Function):
    """Computes closed, open and other tokens with the weights that each group needs.

    Tokens are gathered with ``index_select``, which is several times faster than indexing.
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
        graded: Tensor | None,
        draw: RoundingDraw | None,
    ) -> Tensor:
        order, inverse, closed, not_open = tokens
        ctx.save_for_backward(x, weight, a, b, g, order, inverse, graded)
        ctx.closed, ctx.not_open, ctx.draw = closed, not_open, draw
        weight = dense(weight)
        with autocast_disabled(x):
            delta = hadamard_weight(weight, a, b)
            rows = x.flatten(0, -2).to(weight.dtype).index_select(0, order)  # (tokens, in)
            y = rows.new_empty(len(rows), len(weight))
            y[:not_open] = F.linear(rows[:not_open], weight, bias)
            y[not_open:] = F.linear(rows[not_open:], merged_weight(weight, delta, draw), bias)
            between = slice(closed, not_open)
            gated = rows[between] * _column(g, order[between], rows.dtype)
            # FlopCounterMode does not count addmm_.
            torch.addmm(y[between], gated, delta.t(), out=y[between])
            return y.index_select(0, inverse).view(*x.shape[:-1], len(weight)).detach()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, g, order, inverse, graded = ctx.saved_tensors
        weight = dense(weight)
        closed, not_open, dtype = ctx.closed, ctx.not_open, weight.dtype
        needs_x, _, _, needs_a, needs_b, needs_g, *_ = ctx.needs_input_grad
        dx = da = db = dg = None
        inputs, gradients = x.flatten(0, -2).to(dtype), dy.flatten(0, -2).to(dtype)
        rows = inputs.index_select(0, order)  # (tokens, in)
        du = gradients.index_select(0, order)  # (tokens, out)
        delta = hadamard_weight(weight, a, b)
        between = slice(closed, not_open)
        factor = _column(g, order[between], dtype)
        t = du[between] @ delta  # (in between, in)
        if needs_g:
            dg = torch.zeros_like(g)
            if graded is not None:
                _set_graded_gradient(dg, graded, inputs, gradients, delta)
            _set_gate_gradient(dg, order[between], rows[between], t)
        if needs_x:
            sorted_dx = torch.empty_like(rows)
            torch.mm(du[:not_open], weight, out=sorted_dx[:not_open])
            torch.mm(du[not_open:], merged_weight(weight, delta, ctx.draw), out=sorted_dx[not_open:])
            sorted_dx[between].addcmul_(t, factor)
            dx = x.new_empty(x.shape, dtype=dtype)  # not a view, so that autograd can add to it in place
            torch.index_select(sorted_dx, 0, inverse, out=dx.view(rows.shape))
        if needs_a or needs_b:
            du[between] *= factor
            da, db = factor_gradients(du[closed:], rows[closed:], weight, a, b)
        return _cast(dx, x.dtype), None, None, da, db, dg, None, None, None


def _column(g: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather the gates of ``tokens`` (n,) as a column, (n, 1)."""
    return g.flatten().index_select(0, tokens).unsqueeze(1).to(dtype)


def _set_gate_gradient(dg: Tensor, tokens: Tensor, rows: Tensor, t: Tensor) -> None:
    """Write ``dg = x·t`` of ``tokens`` (n,) into dg (...); rows and t (n, in)."""
    dg.view(-1).index_copy_(0, tokens, (rows * t).sum(-1, dtype=dg.dtype))


def _set_graded_gradient(dg: Tensor, graded: Tensor, inputs: Tensor, dy: Tensor, delta: Tensor) -> None:
    """Write ``dg = x·ΔWᵀ dy`` of the tokens ``graded`` (n,); inputs (tokens, in) and dy (tokens, out)."""
    t = dy.index_select(0, graded) @ delta  # (n, in)
    _set_gate_gradient(dg, graded, inputs.index_select(0, graded), t)


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def partitioned_hadamard(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    graded: Tensor | None = None,
    draw: RoundingDraw | None = None,
) -> Tensor:
    """Compute ``W0 x + b + γ · (W0 ⊙ BA) x`` with fewer large matmuls for every γ that is 0 or 1.

    Equal to the dense form up to the rounding of ``W0 + W0 ⊙ BA`` to W0's dtype, which is right on average
    with a draw. In 16 bits and without a draw, the merged weight is not used. The gradient of γ is
    ``dγ = dy·u(x)`` where γ is neither 0 nor 1 and for the tokens in ``graded``, and 0 elsewhere.

    Args:
        x: Input, (..., in).
        weight: Frozen weight W0, (out, in); gets no gradient.
        bias: Frozen bias, (out,).
        a: Factor A, (r, in).
        b: Factor B, (out, r).
        g: Gate values γ, (...), many of which are exactly 0 or 1.
        graded: Indices into the flattened tokens of those whose γ needs its gradient, (n,).
        draw: Rounds the merged weight, which must then be bfloat16.

    Returns:
        The output, (..., out), in the dtype that the frozen layer's output has, whatever the gates are.
    """
    tokens = tokens_by_gate(g.detach().flatten(), merges=merges_accurately(weight, draw))
    if tokens is None:
        return add_gated_hadamard(F.linear(x, weight, bias), x, weight, a, b, g)
    if tokens.not_open == len(tokens.order):
        between = tokens.order[tokens.closed :]
        y = _SkippingHadamard.apply(x, weight, bias, a, b, g, between, graded)  # type: ignore[no-untyped-call]
    else:
        weights = weight, bias, a, b
        y = _PartitionedHadamard.apply(x, *weights, g, tokens, graded, draw)  # type: ignore[no-untyped-call]
    return cast(Tensor, y).to(matmul_dtype(x, weight))
