"""Saying so when a step takes far longer than usual: a hung process is silent by itself."""

import logging
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from typing import Any

import lightning as L
from typing_extensions import override

log = logging.getLogger(__name__)

_REMEMBERED = 50  # steps that say what is usual


class StepWatchdog(L.Callback):
    """Warns, once a step, when a micro-batch has been running for ``factor`` times the usual time, and says in which line.

    Usual is the median of the last 50. Waiting for data and for other processes counts, validation does not. Each process
    watches itself: the one whose line is no collective is the one the others wait for.
    """

    def __init__(self, factor: float = 10.0, seconds: float = 60.0) -> None:
        """Watch the time of steps.

        Args:
            factor: Multiple of the usual time after which a warning is due; 0 switches it off.
            seconds: No warning before so many, however quick the usual step is.
        """
        for name, value in (("factor", factor), ("seconds", seconds)):
            if value < 0:
                raise ValueError(f"watchdog.{name}: {value}; accepted: a number of at least 0")
        self.factor = factor
        self.seconds = seconds
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._timer: threading.Timer | None = None
        self._since = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._times.append(time.perf_counter() - self._since)
        self._begin(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._begin(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()  # the last checkpoint is no step

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def _begin(self, trainer: L.Trainer) -> None:
        self._end()
        self._since = time.perf_counter()
        if self.factor and self._times:
            usual = statistics.median(self._times)
            self._timer = threading.Timer(
                max(self.seconds, self.factor * usual), self._warn, (trainer, usual, threading.get_ident())
            )
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _warn(self, trainer: L.Trainer, usual: float, thread: int) -> None:
        frame = sys._current_frames().get(thread)
        place = traceback.extract_stack(frame)[-1] if frame is not None else None
        log.warning(
            "process %d: the micro-batch after optimizer step %d has taken %.0f s so far (usual: %.2g s); now in %s",
            trainer.global_rank,
            trainer.global_step,
            time.perf_counter() - self._since,
            usual,
            f"{place.name} ({place.filename}:{place.lineno})" if place else "a place that is not known",
        )
