"""What a training loop took: seconds, peak memory and computed positions, between its first batch and its last step."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Starts and stops at a loop's call; hooks on the embeddings and the output head count the positions in between."""

    def __init__(self, model: Any) -> None:
        self.cpu = self.wall = 0.0
        self.peak_bytes = self.positions = self.head_positions = 0
        self._running = False
        model.get_input_embeddings().register_forward_hook(self._embedded)
        model.get_output_embeddings().register_forward_hook(self._projected)

    def start(self, *_: Any, **__: Any) -> None:
        """Before the first batch is fetched."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # loading has a high-water mark of its own
        self._running = True
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self, *_: Any, **__: Any) -> None:
        """Behind the last optimizer step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        self._running = False
        self.peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _most_resident()

    def _embedded(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.positions += self._running * args[0].numel()

    def _projected(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.head_positions += self._running * args[0].shape[:-1].numel()


def _most_resident() -> int:
    status = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
