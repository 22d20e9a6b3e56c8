"""Preemption: a signal only sets a flag; the checkpoint is written at the next optimizer step, when all ranks agree."""

import logging
import os
import signal
import subprocess
from types import FrameType
from typing import Any

import lightning as L
from typing_extensions import override

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint, validation_follows
from gatera_lightning.errors import ConfigError, Preempted

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class SafePreempt(L.Callback):
    """On SIGUSR1 or SIGTERM: save at the next safe point, ask SLURM to requeue the job, and end every process.

    Saving inside a signal handler, as Lightning's own requeue does, falls into the middle of a step: a batch is lost, or ranks
    wait for each other in different collectives. Here the handler sets a flag, and one all-reduce a step asks whether
    any rank has it. A safe point is the end of an optimizer step that no validation follows at once; else the end of that
    validation, so that a resumed run validates when the uninterrupted one would.
    """

    def __init__(self, requeue: bool = True) -> None:
        """What to do when a signal announces the end.

        Args:
            requeue: Under SLURM, requeue the job once it is saved, if it was started with ``--ckpt_path last`` and so goes on.
                Elsewhere the run ends with exit status 75 either way.
        """
        self.requeue = requeue
        self._received: int | None = None
        self._checkpoint: AdapterCheckpoint | None = None
        self._previous: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = None  # what ended an earlier run does not end this one
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._checkpoint = next((c for c in callbacks if isinstance(c, AdapterCheckpoint)), None)
        if self._checkpoint is None:
            raise ConfigError(
                "trainer.callbacks: SafePreempt saves through an AdapterCheckpoint, and there is none; add one"
            )
        # Behind Lightning's own handlers, whose SIGTERM one runs a collective wherever the signal happens to fall.
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate() and not validation_follows(trainer):
            self._end_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._end_if_asked(trainer, validated=True)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            if (
                signal.getsignal(number) == self._note
            ):  # else Lightning has put back already what was there before the run
                signal.signal(number, handler)
        self._previous = {}

    def _end_if_asked(self, trainer: L.Trainer, *, validated: bool = False) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        assert self._checkpoint is not None  # set when training began
        path = self._checkpoint.write_last(trainer, validated=validated)
        requeued = self.requeue and trainer.is_global_zero and requeue_job()
        raise Preempted(str(path), trainer.global_step, requeued=trainer.strategy.broadcast(requeued))


def requeue_job() -> bool:
    """Ask SLURM to put this job back into its queue; False, with the reason in the log, where it will not."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        # Incomplete: not a job that scancel is ending, which is sent SIGTERM too.
        done = subprocess.run(
            ["scontrol", "requeue", "Incomplete", job], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("cannot requeue job %s: %s", job, error)
        return False
    if done.returncode:
        log.warning("cannot requeue job %s: scontrol says %s", job, done.stderr.strip())
    return done.returncode == 0
