"""What the autograd functions of this package support besides one backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def transforms_are_active() -> bool:
    """Return whether ``torch.func`` (grad, vmap, jvp, …) runs, which needs plain operations."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward pass that cannot be differentiated: ``create_graph=True`` raises RuntimeError.

    With ``once_differentiable`` of PyTorch, ``torch.autograd.grad`` of such a gradient does not raise but
    omits the term, if it is asked for the gradients of some tensors only.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "a backward pass with create_graph=True reached a fused operation of gatera_lightning, which "
                "has no second derivative; accepted: create_graph=False, or torch.func transforms, which use "
                "plain operations"
            )
        with torch.no_grad():
            return backward(ctx, *gradients)

    return wrapper
