"""The loggers of a run that show pictures, histograms and texts; one file for each kind.

A kind is a subclass of :class:`~gatera_lightning.callbacks.run_logs.base.RunLog` and an entry in ``_KINDS``.
"""

import logging
import weakref

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from gatera_lightning.callbacks.run_logs.base import RunLog
from gatera_lightning.callbacks.run_logs.mlflow import MLFlowLog
from gatera_lightning.callbacks.run_logs.tensorboard import TensorBoardLog
from gatera_lightning.callbacks.run_logs.wandb import WandbLog

log = logging.getLogger(__name__)

_KINDS = {TensorBoardLogger: TensorBoardLog, WandbLogger: WandbLog, MLFlowLogger: MLFlowLog}
_NAMED: weakref.WeakSet[Logger] = weakref.WeakSet()


def run_logs(trainer: L.Trainer) -> list[RunLog]:
    """Return the loggers of a run that show pictures, histograms and texts."""
    found = map(_run_log, trainer.loggers)
    return [run_log for run_log in found if run_log is not None]


def scalar_loggers(trainer: L.Trainer) -> list[Logger]:
    """Return the other loggers of a run, which keep scalars only."""
    return [logger for logger in trainer.loggers if _run_log(logger) is None]


def has_run_log(trainer: L.Trainer, content: str, *, missing: str) -> bool:
    """Return whether a run has a logger that shows pictures; name each one that does not, once.

    Args:
        trainer: The trainer of the run.
        content: What needs such a logger, for a warning.
        missing: What the run lacks without one, for the warning.
    """
    found, others = run_logs(trainer), scalar_loggers(trainer)
    names = " and ".join(dict.fromkeys(type(logger).__name__ for logger in others))
    if trainer.is_global_zero and others and not found:
        log.warning(
            "%s need the TensorBoard logger, WandbLogger or MLFlowLogger, and the run has %s: %s",
            content,
            names,
            missing,
        )
    elif trainer.is_global_zero and (new := [logger for logger in others if logger not in _NAMED]):
        names = " and ".join(dict.fromkeys(type(logger).__name__ for logger in new))
        log.info("%s gets the scalars of the gates, but no pictures, histograms and texts", names)
        _NAMED.update(new)
    return bool(found)


def _run_log(logger: Logger) -> RunLog | None:
    return next((log_of(logger) for kind, log_of in _KINDS.items() if isinstance(logger, kind)), None)
