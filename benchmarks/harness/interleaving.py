"""Measure contenders in turns, each in a process of its own, so that a busy machine disturbs all alike.

Ratios are computed within a round; results show their median over the rounds, the lowest and the highest. CPU
seconds are those of the contender's process; wall-clock seconds include what other programs took of the
machine. The peak memory does not include what building the contender needed.
"""

import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import (
    DEVICE,
    describe_machine,
    peak_memory,
    reset_peak_memory,
    synchronize,
)

Round = Callable[[], dict[str, float] | None]
"""What is timed. It may return figures of its own."""


@dataclass
class Measurement:
    """What was measured of one contender, by round."""

    cpu: list[float] = field(default_factory=list)
    """CPU seconds of the process."""

    wall: list[float] = field(default_factory=list)
    """Wall-clock seconds."""

    peak_bytes: int = 0
    """Peak memory over all rounds."""

    figures: list[dict[str, float]] = field(default_factory=list)
    """What the contender returned."""

    def by_round(self, figure: str) -> list[float]:
        """Return one of the contender's own figures for each round."""
        return [figures[figure] for figures in self.figures]

    @property
    def seconds(self) -> list[float]:
        """CPU seconds if the CPU computes, wall-clock seconds if a GPU does."""
        return self.wall if DEVICE == "cuda" else self.cpu


def run_interleaved(
    contenders: Mapping[str, tuple[Callable[..., Round], Any]], rounds: int, warmup: int = 2
) -> dict[str, Measurement]:
    """Build each contender in a process of its own and run them in turns.

    Args:
        contenders: By name, a function that builds the contender, and its arguments.
        rounds: How often each contender is measured.
        warmup: How often each contender runs before that.

    Raises:
        RuntimeError: If the process of a contender ends.
    """
    context = mp.get_context("spawn")
    processes, pipes = {}, {}
    measurements = {name: Measurement() for name in contenders}
    try:
        for name, (build, args) in contenders.items():
            pipes[name], theirs = context.Pipe()
            processes[name] = context.Process(
                target=_contend, args=(theirs, build, args, warmup), daemon=True
            )
            processes[name].start()
            theirs.close()
            _receive(name, pipes[name])  # build and warm up one contender at a time
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                cpu, wall, peak, figures = _receive(name, pipe)
                measurement = measurements[name]
                measurement.cpu.append(cpu)
                measurement.wall.append(wall)
                measurement.peak_bytes = max(measurement.peak_bytes, peak)
                measurement.figures.append(figures)
    finally:
        for process in processes.values():
            process.kill()
    return measurements


def _receive(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} ended; its error message is above") from None


def _contend(pipe: Connection, build: Callable[..., Round], args: Any, warmup: int) -> None:
    torch.set_num_threads(1)
    run_once = build(*args)
    reset_peak_memory()
    for _ in range(warmup):
        run_once()
    pipe.send(True)
    while pipe.recv():
        synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        figures = run_once()
        synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        pipe.send((cpu, wall, peak_memory(), figures or {}))


def format_ratio(a: list[float], b: list[float]) -> str:
    """Return the median of the ratios ``a / b`` by round, with the lowest and the highest."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def write_results(
    path: str | None, settings: Mapping[str, Any], measurements: Mapping[str, Measurement]
) -> None:
    """Write everything that was measured as JSON; does nothing without a path."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    results = {name: vars(measurement) for name, measurement in measurements.items()}
    content = {"machine": describe_machine(), "settings": dict(settings), "results": results}
    Path(path).write_text(json.dumps(content, indent=1))
