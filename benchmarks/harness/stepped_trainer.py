"""Take single optimizer steps with a Lightning Trainer."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L

from benchmarks.harness.fitting import bare_trainer
from gatera_lightning.datamodules.batch import Batch

MAX_STEPS = 10**6


class SteppedTrainer:
    """Runs ``trainer.fit`` in a thread, where it waits for each batch until a step is asked for.

    So a step has everything that it has in a real run: the Trainer's loop, its hooks and its logging.

    Args:
        module: The module to train.
        batch: The batch of every step.
        gradient_clip_val: The largest norm of the gradient.
    """

    def __init__(self, module: L.LightningModule, batch: Batch, *, gradient_clip_val: float) -> None:
        self._batch = batch
        self._inside: AbstractContextManager[Any] = nullcontext()
        self._requested, self._waiting = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self.trainer = bare_trainer(max_steps=MAX_STEPS, gradient_clip_val=gradient_clip_val)
        threading.Thread(target=self._fit, args=(module,), daemon=True).start()
        self._wait()

    def __call__(self, inside: AbstractContextManager[Any] | None = None) -> None:
        """Take one optimizer step, inside a context that is entered in the Trainer's thread."""
        self._inside = nullcontext() if inside is None else inside
        self._requested.release()
        self._wait()

    def __len__(self) -> int:
        """Return the number of batches: without it, Lightning would fetch each batch one step early."""
        return MAX_STEPS

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch whenever a step is requested."""
        while True:
            self._waiting.release()
            self._requested.acquire()
            with self._inside:
                yield self._batch

    def _fit(self, module: L.LightningModule) -> None:
        try:
            self.trainer.fit(module, train_dataloaders=self)
        except BaseException as error:
            self._error = error
            self._waiting.release()

    def _wait(self) -> None:
        self._waiting.acquire()
        if self._error is not None:
            raise self._error
