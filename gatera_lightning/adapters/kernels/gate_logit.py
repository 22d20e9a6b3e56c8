"""The token gate's logit as an autograd function that saves no float32 copy of a bfloat16 input."""

from typing import Any, cast

import torch
from torch import Tensor

from gatera_lightning.adapters.kernels.autocast import autocast_disabled
from gatera_lightning.adapters.kernels.differentiation import first_order_only, transforms_are_active


class _TokenLogit(torch.autograd.Function):
    """``x·w + b`` in w's dtype; saves x in its own dtype, where autograd would save a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _logit(x, w, b)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx = (dz.unsqueeze(-1) * w).to(x.dtype) if ctx.needs_input_grad[0] else None
        flat = dz.flatten()  # (tokens,)
        dw = torch.mv(x.to(w.dtype).flatten(0, -2).t(), flat)
        return dx, dw, flat.sum().unsqueeze(0)


def token_logit(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Compute ``z = w·x + b`` for every token, in w's dtype.

    Args:
        x: Inputs, (..., in).
        w: Gate weight, (in,).
        b: Gate bias, (1,).

    Returns:
        The logits, (...).
    """
    # Without gradients, calling an autograd function would take a twentieth of the time to decode a token.
    if not torch.is_grad_enabled() or transforms_are_active():
        return _logit(x, w, b)
    return cast(Tensor, _TokenLogit.apply(x, w, b))  # type: ignore[no-untyped-call]


def _logit(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with autocast_disabled(x):
        return torch.matmul(x.to(w.dtype), w) + b
