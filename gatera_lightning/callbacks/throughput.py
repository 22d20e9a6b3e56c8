"""How fast: real and target tokens a second, padding not counted."""

import time
from typing import Any

import lightning as L
from typing_extensions import override


class Throughput(L.Callback):
    """Logs ``throughput/tokens_per_second`` and ``throughput/target_tokens_per_second`` of the whole job.

    Counted from the plan's totals per optimizer step, so it costs no synchronisation. Waiting for data counts,
    validation does not.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        """Measure speed.

        Args:
            every_n_steps: Optimizer steps between two readings; 0 switches them off.
        """
        if every_n_steps < 0:
            raise ValueError(f"throughput.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never")
        self.every_n_steps = every_n_steps
        self._seconds = 0.0
        self._tokens = self._targets = 0
        self._since = 0.0
        self._step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._step = time.perf_counter(), trainer.global_step

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        if trainer.global_step == self._step:
            return  # in the middle of an accumulated step
        self._step = trainer.global_step
        self._tokens += batch["step_tokens"]
        self._targets += batch["step_targets"]
        if self.every_n_steps and self._step % self.every_n_steps == 0:
            rates = {
                "throughput/tokens_per_second": self._tokens / self._seconds,
                "throughput/target_tokens_per_second": self._targets / self._seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=self._step)
            self._seconds, self._tokens, self._targets = 0.0, 0, 0
