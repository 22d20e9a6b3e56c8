"""Check settings that count steps against the number of steps that the data gives."""

import logging
import math
from typing import Any

import lightning as L

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.errors import ConfigError
from gatera_lightning.training.optimizer import OptimizerConfig

log = logging.getLogger(__name__)


def check_against_data(trainer: L.Trainer, optimizer: OptimizerConfig) -> None:
    """Refuse a validation that never comes, and name a warm-up that never ends, before weights are loaded.

    Args:
        trainer: The Trainer of a fit, whose data module is set up.
        optimizer: The optimizer's settings.

    Raises:
        ConfigError: ``val_check_interval`` is beyond the epoch.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SupervisedDataModule) or "train" not in data.tables:
        return
    interval = trainer.val_check_interval
    counted = isinstance(interval, int) and trainer.check_val_every_n_epoch is not None
    wanted = interval if counted and trainer.limit_val_batches else 0
    steps = _planned_steps(trainer, _least_micro_batches(trainer, data))
    if wanted <= _least_micro_batches(trainer, data) and optimizer.warmup_steps < steps:
        return  # without building the schedule, which takes seconds for large data
    micro_batches = data.train_dataloader().micro_batches_per_epoch
    if wanted > micro_batches:
        raise ConfigError(
            f"trainer.val_check_interval: {interval}, but an epoch has {micro_batches} micro-batches; "
            f"accepted: at most {micro_batches}, a share of an epoch such as 1.0, or "
            "trainer.check_val_every_n_epoch null to count over epochs",
            on_every_rank=True,
        )
    steps = _planned_steps(trainer, micro_batches)
    if optimizer.warmup_steps >= steps and trainer.is_global_zero:
        log.warning(
            "model.optimizer.warmup_steps: %d, but the run has %d steps: the learning rate never reaches "
            "model.optimizer.lr %g",
            optimizer.warmup_steps,
            steps,
            optimizer.lr,
        )


def _least_micro_batches(trainer: L.Trainer, data: Any) -> int:
    """A lower bound for the micro-batches of an epoch: full steps, of which the last may be merged."""
    steps = max(1, math.ceil(len(data.tables["train"]) / data.batch_size) - 1)
    available = steps * trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches
    return min(available, limit if isinstance(limit, int) else int(limit * available))


def _planned_steps(trainer: L.Trainer, micro_batches: int) -> float:
    """The optimizer steps of a run whose epochs have this many micro-batches."""
    epochs = trainer.max_epochs
    steps = micro_batches // trainer.accumulate_grad_batches
    by_epochs = math.inf if epochs is None or epochs == -1 else epochs * steps
    return min(by_epochs, math.inf if trainer.max_steps == -1 else trainer.max_steps)
