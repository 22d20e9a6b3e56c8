"""A run's TensorBoard loggers: where pictures and texts can go."""

import logging

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

log = logging.getLogger(__name__)


def tensorboard_loggers(trainer: L.Trainer, *, missing: str = "") -> list[TensorBoardLogger]:
    """Those of the run's loggers that write for TensorBoard; where all are others, the first process says ``missing``."""
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if missing and trainer.loggers and not found and trainer.is_global_zero:
        log.warning(missing)
    return found
