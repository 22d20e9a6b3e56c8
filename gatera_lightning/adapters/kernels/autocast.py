"""Run a block of code without autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def matmul_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of ``F.linear(x, weight)`` for a weight and an input of one dtype."""
    device = "cpu" if x.is_meta else x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return weight.dtype


def autocast_disabled(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast leaves operations on ``x``'s device alone.

    Autocast does not exist on the meta device, where costs are estimated; the context is then the CPU's.
    """
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
