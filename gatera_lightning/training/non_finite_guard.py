"""Skip optimizer steps whose loss or gradient is not finite, and stop the run after too many of them."""

import logging
import math

import lightning as L
import torch
from torch import Tensor

from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.errors import NonFiniteLossError

log = logging.getLogger(__name__)


class NonFiniteGuard:
    """Counts skipped optimizer steps and knows which examples each micro-batch of the current step holds."""

    def __init__(self, max_skipped_steps: int, lr: float) -> None:
        """Start with no skipped steps.

        Args:
            max_skipped_steps: How many steps may be skipped; at the next one the run stops.
            lr: The learning rate that the error message shows.
        """
        self.max_skipped_steps = max_skipped_steps
        self.lr = lr
        self.skipped_steps = 0
        self._micro_batches: list[tuple[Tensor, Tensor]] = []

    def restore(self, skipped_steps: int) -> None:
        """Take over the count of a checkpoint."""
        self.skipped_steps = skipped_steps

    def add(self, loss: Tensor, example_ids: Tensor) -> None:
        """Remember one micro-batch: its detached loss, and its example ids (batch,)."""
        self._micro_batches.append((loss, example_ids))

    def clear(self) -> None:
        """Start the next step."""
        self._micro_batches.clear()

    def skip(
        self, trainer: L.Trainer, optimizer: torch.optim.Optimizer, *, loss: float, gradient_norm: float
    ) -> None:
        """Make the optimizer step do nothing: without gradients, neither parameters nor moments change.

        A collective: every rank calls it with the same values.

        Raises:
            NonFiniteLossError: On every rank, if ``max_skipped_steps`` steps have been skipped already. The
                message has the step, the example ids of the micro-batches concerned, and the last checkpoint.
        """
        reason = self._describe(trainer, loss, gradient_norm)
        if self.skipped_steps >= self.max_skipped_steps:
            last = getattr(trainer.checkpoint_callback, "last_model_path", "") or "none was written"
            raise NonFiniteLossError(
                f"{reason} To skip such steps, raise model.optimizer.max_skipped_steps "
                f"(now {self.max_skipped_steps}; skipped so far: {self.skipped_steps}). "
                f"Last checkpoint: {last}"
            )
        self.skipped_steps += 1
        if trainer.is_global_zero:
            log.warning(
                "skipped %d of at most %d steps: %s", self.skipped_steps, self.max_skipped_steps, reason
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _describe(self, trainer: L.Trainer, loss: float, gradient_norm: float) -> str:
        """The step, and on every rank the examples with a non-finite loss, or all if only a gradient is."""
        loss_is_finite = math.isfinite(loss)
        blamed = [
            int(i)
            for value, ids in self._micro_batches
            if loss_is_finite or not torch.isfinite(value)
            for i in ids
        ]
        ids = sorted(i for of_rank in gather_objects(blamed) for i in of_rank)
        return (
            f"the loss of optimizer step {trainer.global_step + 1} is {loss} and the norm of its gradients "
            f"{gradient_norm}; example ids (indices in the training split) of the micro-batches concerned: "
            f"{ids}. The step was not taken, and earlier checkpoints are unchanged. Usual causes: "
            f"model.optimizer.lr is too high ({self.lr}), or gradients are not clipped "
            "(trainer.gradient_clip_val)."
        )
