"""Contenders side by side: a process each, one after another in every round, so that a busy machine disturbs all alike.

Ratios are taken within a round and their median over the rounds is told, with the lowest and the highest. CPU seconds are those
of the contender's process, wall seconds include what other programs took of the machine. Peaks are a process's largest resident
set, of Linux, or what CUDA had allocated at most; what building needed is left out.
"""

import ctypes
import json
import multiprocessing as mp
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Round = Callable[[], dict[str, float] | None]
"""What is timed; it may return figures of its own."""


@dataclass
class Measured:
    """What one contender needed, by round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    figures: list[dict[str, float]] = field(default_factory=list)

    def rounds(self, figure: str) -> list[float]:
        """A figure of each round."""
        return [figures[figure] for figures in self.figures]


def interleaved(
    contenders: Mapping[str, tuple[Callable[..., Round], Any]], rounds: int, warmup: int = 2
) -> dict[str, Measured]:
    """Build each contender in its own process, by ``build(*args)``, and let them take turns ``rounds`` times.

    Raises RuntimeError with the contender's name when its process ends.
    """
    context = mp.get_context("spawn")
    processes, pipes = {}, {}
    measured = {name: Measured() for name in contenders}
    try:
        for name, (build, args) in contenders.items():
            pipes[name], theirs = context.Pipe()
            processes[name] = context.Process(
                target=_contend, args=(theirs, build, args, warmup), daemon=True
            )
            processes[name].start()
            theirs.close()
            _answer(name, pipes[name])  # one is built and warmed up after another
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                cpu, wall, peak, figures = _answer(name, pipe)
                measured[name].cpu.append(cpu)
                measured[name].wall.append(wall)
                measured[name].peak_bytes = max(measured[name].peak_bytes, peak)
                measured[name].figures.append(figures)
    finally:
        for process in processes.values():
            process.kill()
    return measured


def _answer(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} ended; what it said stands above") from None


def _contend(pipe: Connection, build: Callable[..., Round], args: Any, warmup: int) -> None:
    torch.set_num_threads(1)
    once = build(*args)
    _forget_peak()
    for _ in range(warmup):
        once()
    pipe.send(True)
    while pipe.recv():
        _finish()
        cpu, wall = time.process_time(), time.perf_counter()
        figures = once()
        _finish()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        pipe.send((cpu, wall, _peak(), figures or {}))


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """What building needed is no part of a round."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def clock(measured: Measured) -> list[float]:
    """The seconds that count: of the processor where it computes, of the clock where a GPU does."""
    return measured.wall if torch.cuda.is_available() else measured.cpu


def ratio(a: list[float], b: list[float]) -> str:
    """Median of the rounds' ratios, with the lowest and the highest."""
    by_round = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(by_round):.2f} ({min(by_round):.2f} to {max(by_round):.2f})"


def machine() -> str:
    """Where the figures come from."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with open("/proc/cpuinfo") as info:
        name = next(
            (line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine()
        )
    return f"{name}, one thread, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def write(path: str | None, settings: Mapping[str, Any], measured: Mapping[str, Measured]) -> None:
    """Everything measured as JSON, where ``path`` names a file."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        results = {name: vars(one) for name, one in measured.items()}
        Path(path).write_text(
            json.dumps({"machine": machine(), "settings": dict(settings), "results": results}, indent=1)
        )
