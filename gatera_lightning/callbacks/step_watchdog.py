"""A warning when a step takes far longer than usual, because a hung process prints nothing."""

import logging
import math
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

_WINDOW = 50  # number of recent micro-batches that define the usual time


class StepWatchdog(L.Callback):
    """Warn when a micro-batch runs for ``factor`` times the usual time, and name the line that is running.

    The usual time is the median of the last 50 micro-batches. Time spent waiting for data or for other ranks
    counts, validation does not. There is one warning for each slow micro-batch. Each rank watches itself: the
    rank whose warning does not name a collective is the one that the others wait for.

    Example:
        >>> trainer = Trainer(callbacks=[StepWatchdog(factor=20)])
    """

    def __init__(self, factor: float = 10.0, seconds: float = 60.0) -> None:
        """Warn when a micro-batch takes far longer than usual.

        Args:
            factor: Warn when a micro-batch has taken this many times the usual time; 0 turns the warnings
                off. A small factor also warns about micro-batches that are merely large.
            seconds: Never warn before a micro-batch has taken this many seconds, however short the usual time
                is.

        Raises:
            ValueError: ``factor`` or ``seconds`` is negative or not a finite number.
        """
        for name, value in (("factor", factor), ("seconds", seconds)):
            if not 0 <= value < math.inf:
                raise ValueError(f"watchdog.{name}: {value}; accepted: a number of at least 0")
        self.factor = factor
        self.seconds = seconds
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._timer: threading.Timer | None = None
        self._since = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_timer(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._times.append(time.perf_counter() - self._since)
        self._start_timer(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cancel_timer()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._start_timer(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cancel_timer()  # writing the last checkpoint is not a step

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._cancel_timer()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._cancel_timer()

    def _start_timer(self, trainer: L.Trainer) -> None:
        self._cancel_timer()
        self._since = time.perf_counter()
        if self.factor and self._times:
            usual = statistics.median(self._times)
            self._timer = threading.Timer(
                max(self.seconds, self.factor * usual), self._warn, (trainer, usual, threading.get_ident())
            )
            self._timer.daemon = True
            self._timer.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _warn(self, trainer: L.Trainer, usual: float, thread: int) -> None:
        frame = sys._current_frames().get(thread)
        place = traceback.extract_stack(frame)[-1] if frame is not None else None
        log.warning(
            "rank %d: the micro-batch after optimizer step %d has taken %.0f s so far (usual: %.2g s); "
            "now in %s",
            trainer.global_rank,
            trainer.global_step,
            time.perf_counter() - self._since,
            usual,
            f"{place.name} ({place.filename}:{place.lineno})" if place else "an unknown line",
        )
