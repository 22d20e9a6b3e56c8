"""Refuse settings of the Trainer that contradict each other, or that would have no effect in a run."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, Timer

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.early_stopping import OptionalEarlyStopping
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.validation_tasks import validation_tasks
from gatera_lightning.errors import near_miss
from gatera_lightning.evaluation.likelihood_ranking import Score
from gatera_lightning.objectives.base import Objective
from gatera_lightning.objectives.gate_entropy import GateEntropy
from gatera_lightning.objectives.gate_sparsity import GateSparsity
from gatera_lightning.objectives.next_token import NextToken
from gatera_lightning.objectives.self_draft import SelfDraft
from gatera_lightning.training.objective_means import validation_names

_LOGGED = ("train/loss", "train/task_loss", "train/gate_entropy", "train/gate_mean", "train/skipped_steps")
_VALIDATED = ("val/loss", *(f"val/accuracy_{score}" for score in get_args(Score)))
_COUNTED = ("step", "epoch")  # a ModelCheckpoint has both even if nothing is logged


def effect_problems(trainer: L.Trainer, *, objectives: Sequence[Objective], is_ours: bool) -> list[str]:
    """Return one message for every setting that cannot have an effect in a fit.

    Args:
        trainer: The Trainer, whose data module is set up if it has one of this package.
        objectives: What is trained; their terms are logged.
        is_ours: Whether the module is no subclass of a user, which may log and stop as it likes.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    problems = checkpoint_io_problems(trainer.strategy.checkpoint_io)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # replaces these settings by its own
        return problems
    is_ours = is_ours and not any(map(_is_foreign, callbacks))
    may_stop = not is_ours or any(map(_may_stop, callbacks))
    problems += _limit_problems(trainer, may_stop) + _timer_problems(callbacks)
    epochs, every = trainer.max_epochs, trainer.check_val_every_n_epoch
    if _validates(trainer) is True and every is not None and epochs is not None and -1 < epochs < every:
        problems.append(
            f"trainer.check_val_every_n_epoch: {every}, but the run has {epochs} epochs, so that it never "
            f"validates; accepted: at most {epochs}, or trainer.limit_val_batches 0"
        )
    if is_ours:
        for callback in callbacks:
            problems += _monitor_problems(trainer, callback, objectives)
    return problems


def checkpoint_io_problems(plugin: Any) -> list[str]:
    """Refuse a plugin that writes checkpoints in another way than atomically and checked.

    Args:
        plugin: The strategy's ``checkpoint_io``, once Lightning's default is replaced.
    """
    if isinstance(plugin, AtomicCheckpointIO):
        return []
    return [
        f"trainer.plugins: {type(plugin).__name__}, but checkpoints are written atomically and with "
        "digests, and a failed write must end the run on all ranks; accepted: none, or a subclass of "
        "gatera_lightning.checkpointing.checkpoint_io.AtomicCheckpointIO"
    ]


def _limit_problems(trainer: L.Trainer, may_stop: bool) -> list[str]:
    problems = []
    for unit in ("epochs", "steps"):
        least, most = getattr(trainer, f"min_{unit}"), getattr(trainer, f"max_{unit}")
        if least and most is not None and -1 < most < least:
            problems.append(
                f"trainer.min_{unit}: {least}, but trainer.max_{unit} is {most}; accepted: at most {most}"
            )
        elif least and least != most and (least > 1 or unit == "steps") and not may_stop:
            problems.append(
                f"trainer.min_{unit}: {least}, but nothing ends the run before its last step; accepted: "
                "null, or with trainer.max_time or early_stopping.patience"
            )
    return problems


def _timer_problems(callbacks: Iterable[Any]) -> list[str]:
    """Refuse a time that is over before the first step; ``trainer.max_time`` is a Timer, too."""
    return [
        f"trainer.max_time (Timer): {remaining:g} seconds; accepted: a time above 0"
        for callback in callbacks
        if isinstance(callback, Timer) and callback.start_time() is None
        if (remaining := callback.time_remaining()) is not None and remaining <= 0
    ]


def _monitor_problems(trainer: L.Trainer, callback: Any, objectives: Sequence[Objective]) -> list[str]:
    """Refuse a callback that waits for a value that is never logged; nothing else than this package logs."""
    if not isinstance(callback, EarlyStopping | ModelCheckpoint) or callback.monitor is None:
        return []
    if isinstance(callback, OptionalEarlyStopping) and not callback.is_on:
        return []
    section = {OptionalEarlyStopping: "early_stopping", AdapterCheckpoint: "checkpoint"}
    name = section.get(type(callback), f"trainer.callbacks: {type(callback).__name__}")
    monitor = callback.monitor
    tasks = validation_tasks(getattr(trainer, "datamodule", None)).values()
    validated = validation_names(objectives, tasks) or _VALIDATED
    if monitor in validated and _validates(trainer) is False:
        if isinstance(callback, AdapterCheckpoint):
            return []  # its default, which saves the last checkpoints alone
        return [
            f"{name}.monitor: {monitor!r} needs a validation, and this run has none; accepted: "
            "data.validation with trainer.limit_val_batches above 0, or no such callback"
        ]
    logged = (*_logged(objectives), *_terms(objectives), *validated)
    if monitor in (*logged, *_COUNTED) or monitor.startswith(("grad_norm/", "lr/")):
        return []
    if monitor.startswith("train/") and (_have_own_terms(objectives) or not near_miss(monitor, logged)):
        return []
    return [
        f"{name}.monitor: {monitor!r} is never logged; accepted: {', '.join(logged)}"
        f"{near_miss(monitor, logged)}"
    ]


def _logged(objectives: Iterable[Objective]) -> tuple[str, ...]:
    """Return the names that every step logs; draft rows have no task loss, and their gates are given."""
    drafts = [objective for objective in objectives if isinstance(objective, SelfDraft)]
    if not drafts:
        return _LOGGED
    terms = (f"train/{name}" for objective in drafts for name in objective.form.term_names)
    return ("train/loss", *terms, "train/skipped_steps")


def _terms(objectives: Iterable[Objective]) -> tuple[str, ...]:
    """Return the names of terms that are logged with some objectives only."""
    sparsity = any(isinstance(objective, GateSparsity) for objective in objectives)
    return ("train/gate_openness", "train/gate_skipped") if sparsity else ()


def _have_own_terms(objectives: Iterable[Objective]) -> bool:
    """Whether one of the objectives is a user's, whose terms have any names."""
    return any(
        type(objective) not in (NextToken, GateEntropy, GateSparsity, SelfDraft) for objective in objectives
    )


def _validates(trainer: L.Trainer) -> bool | None:
    """Whether the run has validation data that it may look at; None if only Lightning can tell."""
    if not trainer.limit_val_batches:
        return False
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SupervisedDataModule):
        return None
    if getattr(data.val_dataloader, "__func__", None) is not SupervisedDataModule.val_dataloader:
        return None  # a user's own loader, which needs no such table
    return "validation" in data.tables


def _may_stop(callback: Any) -> bool:
    """Whether a callback of Lightning or of this package may end the run early."""
    if isinstance(callback, OptionalEarlyStopping):
        return callback.is_on
    return isinstance(callback, EarlyStopping | Timer)


def _is_foreign(callback: Any) -> bool:
    """Whether a callback runs a user's code, which may log and stop as it likes."""
    package = type(callback).__module__.partition(".")[0]
    return package not in ("lightning", "gatera_lightning") or isinstance(callback, LambdaCallback)
