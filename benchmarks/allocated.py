"""What PyTorch's allocator has handed out at the worst moment of a step: tensors, without interpreter, libraries and heap."""

from collections.abc import Callable
from itertools import accumulate
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
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in there)
    }
    return sum(storages.values()) + _above(step)


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Of what ``forward()`` has allocated, what is left while its result is held: what autograd keeps for backward."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        held = forward()
        kept = torch.cuda.memory_allocated() - before
        del held
        return kept
    return sum(_events(forward))


def _above(step: Callable[[], Any]) -> int:
    """Bytes that the CPU's allocator hands out at most, above those before."""
    return max(accumulate(_events(step)))


def _events(call: Callable[[], Any]) -> list[int]:
    """Bytes that the CPU's allocator handed out (+) and got back (-) in ``call()``, in order; its result is held meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = call()
    del held
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
