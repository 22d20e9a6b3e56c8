"""Allocated memory of a step: tensors only, without the interpreter, its libraries and the heap."""

from contextlib import AbstractContextManager
from itertools import accumulate
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gatera_lightning.adapters.packed_weight import stored_tensors


class Step(Protocol):
    """One optimizer step.

    The context is entered in the thread that computes, since PyTorch's profiler and counters observe only
    their own thread.
    """

    def __call__(self, inside: AbstractContextManager[Any] = ...) -> None:
        """Take the step inside a context."""


class Forward(Protocol):
    """Computes a loss."""

    def __call__(self) -> Tensor:
        """Return the loss, part of the autograd graph."""


class RecordedAllocations(AbstractContextManager["RecordedAllocations"]):
    """Record what the CPU's allocator hands out and gets back inside the ``with`` block.

    ``changes`` has the bytes in order: positive when they are allocated, negative when they are freed.
    """

    def __init__(self) -> None:
        self.changes: list[int] = []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "RecordedAllocations":
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        events = [
            event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"
        ]
        self.changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_allocated_bytes(step: Step, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Return the peak allocated memory of a step.

    Args:
        step: The step. It was taken before, so that the optimizer's moments exist; gradients do not.
        model: The model that it trains.
        optimizer: Its optimizer; None if nothing is trained.
    """
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    existing = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        existing += [
            value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
    parts = (part.untyped_storage() for tensor in existing for part in stored_tensors(tensor))
    storages = {storage.data_ptr(): storage.nbytes() for storage in parts}
    recorded = RecordedAllocations()
    step(recorded)
    return sum(storages.values()) + max(accumulate(recorded.changes))


def saved_bytes(forward: Forward) -> int:
    """Return the bytes that a forward pass saves for backward: those that are alive with its loss."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        loss = forward()
        saved = torch.cuda.memory_allocated() - before
        del loss
        return saved
    with RecordedAllocations() as recorded:
        loss = forward()
    del loss
    return sum(recorded.changes)
