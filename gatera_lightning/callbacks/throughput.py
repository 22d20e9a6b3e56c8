"""How fast: real and target tokens a second, padding not counted."""

import time
from typing import Any

import lightning as L
from typing_extensions import override


class Throughput(L.Callback):
    """Logs ``throughput/tokens_per_second`` and ``throughput/target_tokens_per_second`` of the whole job.

    Counted from the plan's totals per optimizer step, so it costs no synchronisation; validation and checkpoint
    writing between two readings are left out.
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
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._started
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._tokens += batch["step_tokens"]
        self._targets += batch["step_targets"]
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            pl_module.log_dict(
                {
                    "throughput/tokens_per_second": self._tokens / self._seconds,
                    "throughput/target_tokens_per_second": self._targets / self._seconds,
                }
            )
            self._seconds, self._tokens, self._targets = 0.0, 0, 0
