"""Find the TensorBoard loggers of a run, which are the only ones that accept pictures and texts."""

import logging

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

log = logging.getLogger(__name__)


def tensorboard_loggers(trainer: L.Trainer, *, missing: str = "") -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers of a run.

    Args:
        trainer: The trainer of the run.
        missing: A warning for rank 0 to log if the run has loggers but none of them is a TensorBoard logger.
    """
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if missing and trainer.loggers and not found and trainer.is_global_zero:
        log.warning(missing)
    return found
