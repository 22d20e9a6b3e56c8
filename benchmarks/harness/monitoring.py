"""Monitor a training loop: seconds, peak memory and computed positions from first batch to last step."""

import time
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.machine import peak_memory, reset_peak_memory, synchronize


class LoopMonitor:
    """Measures between :meth:`start` and :meth:`stop`; hooks count the positions in between.

    Args:
        model: The model that the loop trains.
    """

    def __init__(self, model: Any) -> None:
        self.cpu = self.wall = 0.0
        self.peak_bytes = self.positions = self.head_positions = 0
        self._running = False
        model.get_input_embeddings().register_forward_hook(self._count_positions)
        model.get_output_embeddings().register_forward_hook(self._count_head_positions)

    def start(self, *_: Any, **__: Any) -> None:
        """Start to measure, before the first batch is fetched."""
        synchronize()
        reset_peak_memory()
        self._running = True
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self, *_: Any, **__: Any) -> None:
        """Stop to measure, after the last optimizer step."""
        synchronize()
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        self._running = False
        self.peak_bytes = peak_memory()

    def _count_positions(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.positions += self._running * args[0].numel()

    def _count_head_positions(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.head_positions += self._running * args[0].shape[:-1].numel()
