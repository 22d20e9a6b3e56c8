"""Preemption: after a signal, training saves a checkpoint at the next safe point; an evaluation ends."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from typing_extensions import override

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.compatibility.lightning_internals import is_accumulating, validation_follows
from gatera_lightning.errors import ConfigError, Interrupted, Preempted

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class SafePreempt(L.Callback):
    """On SIGUSR1 or SIGTERM, save at the next safe point, ask SLURM to requeue the job, and end all ranks.

    Lightning's own requeue saves inside the signal handler, in the middle of a step. It can lose a batch, and
    ranks can wait for each other in different collectives. Here the handler only sets a flag, and one
    all-reduce in each step tells all ranks whether any of them received a signal.

    A safe point is the end of an optimizer step. If a validation follows that step, it is the end of the
    validation, so that a resumed run validates at the same steps as an uninterrupted one.

    An evaluation outside of training has nothing to save: SIGTERM ends it at once by raising Interrupted.
    Lightning alone would end it quietly, as if all of it were done.

    Needs an AdapterCheckpoint among the callbacks of a training run, which it ends by raising Preempted.

    Example:
        >>> trainer = Trainer(callbacks=[AdapterCheckpoint(), SafePreempt()])
    """

    def __init__(self, requeue: bool = True) -> None:
        """Save and end the run after SIGUSR1 or SIGTERM.

        Args:
            requeue: Under SLURM, requeue the job after saving, provided it was started with --ckpt_path last,
                so that it resumes. If false, and everywhere outside of SLURM, the run ends with exit status
                75.
        """
        self.requeue = requeue
        self._received: int | None = None
        self._checkpoint: AdapterCheckpoint | None = None
        self._previous: dict[int, Any] = {}
        self._installed: dict[int, Any] = {}

    def disable_requeue(self) -> None:
        """Never requeue the job, for a run that would start from the beginning instead of resuming."""
        self.requeue = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = None  # the signal that ended an earlier run does not end this one
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._checkpoint = next((c for c in callbacks if isinstance(c, AdapterCheckpoint)), None)
        if self._checkpoint is None:
            raise ConfigError(
                "trainer.callbacks: SafePreempt needs an AdapterCheckpoint to save with; add one"
            )
        # Install the handlers after Lightning's own: its SIGTERM handler runs a collective at any point of a
        # step.
        for number in SIGNALS:
            self._handle(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def end_evaluation(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_IGN)  # once is enough: the run is ending
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.Signals(number))  # the ranks that this process started
            raise Interrupted(number, str(getattr(trainer.state.fn, "value", "")))

        self._handle(signal.SIGTERM, end_evaluation)

    on_predict_start = on_sanity_check_start = on_test_start

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            previous = signal.signal(number, handler)
            self._previous.setdefault(number, previous)
            self._installed[number] = handler

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_accumulating(trainer) and not validation_follows(trainer):
            self._end_if_signaled(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._end_if_signaled(trainer, validated=True)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            current = signal.getsignal(number)
            # Otherwise Lightning has already restored the handler.
            if current == self._installed[number] or current == signal.SIG_IGN:
                signal.signal(number, handler)
        self._previous, self._installed = {}, {}

    def _end_if_signaled(self, trainer: L.Trainer, *, validated: bool = False) -> None:
        """Save, requeue and raise Preempted if any rank received a signal; a collective."""
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        assert self._checkpoint is not None  # set in on_train_start
        path = self._checkpoint.write_last(trainer, validated=validated)
        requeued = self.requeue and trainer.is_global_zero and requeue_job()
        raise Preempted(str(path), trainer.global_step, requeued=trainer.strategy.broadcast(requeued))


def requeue_job() -> bool:
    """Ask SLURM to requeue this job.

    Returns:
        Whether SLURM accepted. If it refused, a warning says why. False outside of SLURM.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        # "Incomplete" excludes a job that scancel is ending, which also receives SIGTERM.
        done = subprocess.run(
            ["scontrol", "requeue", "Incomplete", job], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("cannot requeue job %s: %s", job, error)
        return False
    if done.returncode:
        log.warning("cannot requeue job %s: scontrol says %s", job, done.stderr.strip())
    return done.returncode == 0
