"""What PyTorch's allocator has handed out at the worst moment of a step: tensors, without interpreter, libraries and heap."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], Any], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Of a step that was taken before: weights and moments are there, gradients are not."""
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    there = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        there += [moment for state in optimizer.state.values() for moment in state.values()]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in there)}
    return sum(storages.values()) + _above(step)


def _above(step: Callable[[], Any]) -> int:
    """Bytes that the CPU's allocator hands out at most, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
