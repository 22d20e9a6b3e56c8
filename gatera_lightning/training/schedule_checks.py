"""Check settings that count steps against the number of steps that the data gives."""

import logging
import math
from typing import Any

import lightning as L

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batching.batch_schedule import empty_share
from gatera_lightning.errors import ConfigError
from gatera_lightning.training.optimizer import OptimizerConfig

log = logging.getLogger(__name__)

_EVALUATION_LIMITS = {
    "fit": ("limit_val_batches", "val_dataloader"),
    "validate": ("limit_val_batches", "val_dataloader"),
    "test": ("limit_test_batches", "test_dataloader"),
    "predict": ("limit_predict_batches", "predict_dataloader"),
}
"""Stage -> the limit of its evaluation batches, and the method that returns their loaders."""


def check_against_data(trainer: L.Trainer, optimizer: OptimizerConfig) -> None:
    """Refuse a validation that never comes, and name a warm-up that never ends, before weights are loaded.

    Args:
        trainer: The Trainer of a fit, whose data module is set up.
        optimizer: The optimizer's settings.

    Raises:
        ConfigError: ``val_check_interval`` is beyond the epoch, or the epoch is empty.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SupervisedDataModule) or "train" not in data.tables:
        return
    interval = trainer.val_check_interval
    counted = isinstance(interval, int) and trainer.check_val_every_n_epoch is not None
    wanted = interval if counted and trainer.limit_val_batches else 0
    least_batches = _least_micro_batches(trainer, data)
    steps = _planned_steps(trainer, least_batches)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _name_missing_validation(trainer, data, least_batches)
    accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    uneven = isinstance(limit, int) and limit % accumulate != 0  # the schedule refuses it
    counted_steps = max(optimizer.warmup_steps + 1, *_counted_steps(trainer))
    if least_batches and wanted <= least_batches and counted_steps <= steps and not uneven:
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
    least, between_logs = _counted_steps(trainer)
    if least > steps:
        raise ConfigError(
            f"trainer.min_steps: {least}, but the run has {steps} steps; accepted: at most {steps}",
            on_every_rank=True,
        )
    if between_logs > steps and trainer.is_global_zero:
        log.warning(
            "trainer.log_every_n_steps: %d, but the run has %d steps: none of them is logged",
            between_logs,
            steps,
        )
    if optimizer.warmup_steps >= steps and trainer.is_global_zero:
        log.warning(
            "model.optimizer.warmup_steps: %d, but the run has %d steps: the learning rate never reaches "
            "model.optimizer.lr %g",
            optimizer.warmup_steps,
            steps,
            optimizer.lr,
        )


def check_shares(trainer: L.Trainer, stage: str) -> None:
    """Refuse a share of the evaluation batches that rounds to none, before weights are loaded.

    The share of training batches is checked with their schedule.

    Args:
        trainer: The Trainer, whose data module is set up.
        stage: What it runs: fit, validate, test or predict.

    Raises:
        ConfigError: The share leaves none of the batches.
    """
    name, method = _EVALUATION_LIMITS[stage]
    data, limit = getattr(trainer, "datamodule", None), getattr(trainer, name)
    if not isinstance(data, SupervisedDataModule) or not isinstance(limit, float) or not 0 < limit < 1:
        return
    if getattr(getattr(data, method), "__func__", None) is not getattr(SupervisedDataModule, method):
        return  # a user's own loaders
    if ("test" if method != "val_dataloader" else "validation") not in data.tables:
        return
    loaders = getattr(data, method)()
    sizes = [len(loader) for loader in (loaders if isinstance(loaders, list) else [loaders])]
    if smallest := min((size for size in sizes if size and not int(size * limit)), default=0):
        raise ConfigError(empty_share(name, limit, smallest), on_every_rank=True)


def _name_missing_validation(trainer: L.Trainer, data: Any, micro_batches: int) -> None:
    """Refuse, or name, a validation that ``max_steps`` comes before.

    Args:
        trainer: The Trainer.
        data: The data module.
        micro_batches: A lower bound for those of an epoch; what it leaves open is not named.

    Raises:
        ConfigError: ``check_val_every_n_epoch`` asks for more epochs than the run has.
    """
    if not trainer.limit_val_batches or "validation" not in data.tables or trainer.max_steps == -1:
        return
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    first = interval if isinstance(interval, int) else max(1, int(interval * micro_batches))
    total = trainer.max_steps * trainer.accumulate_grad_batches
    if every is not None and every > 1 and total <= (every - 1) * micro_batches:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch: {every}, but the run ends at trainer.max_steps "
            f"{trainer.max_steps}, in an earlier epoch, so that it never validates; accepted: a smaller "
            "number, or trainer.limit_val_batches 0",
            on_every_rank=True,
        )
    if total < first and trainer.is_global_zero:
        log.warning(
            "trainer.val_check_interval: %s, but the run ends at trainer.max_steps %d, before its first "
            "validation: it never validates",
            interval,
            trainer.max_steps,
        )


def _counted_steps(trainer: L.Trainer) -> tuple[int, int]:
    """``min_steps`` and, if there is a logger, ``log_every_n_steps``."""
    return trainer.min_steps or 0, trainer.log_every_n_steps if trainer.loggers else 0  # type: ignore[attr-defined]


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
