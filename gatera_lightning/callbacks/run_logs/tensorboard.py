"""Pictures, histograms and texts in TensorBoard's event files."""

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from gatera_lightning.callbacks.run_logs.base import Histogram, RunLog
from gatera_lightning.compatibility.lightning_internals import write_gate_summaries


def tensorboard_loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers of a run."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


@dataclass(frozen=True)
class TensorBoardLog(RunLog):
    """Writes to a TensorBoard logger."""

    logger: TensorBoardLogger

    @override
    def log_statistics(
        self, scalars: Mapping[str, float], histograms: Mapping[str, Histogram], step: int
    ) -> None:
        fields = {
            tag: {
                "min": 0,
                "max": 1,
                "num": sum(histogram.counts),
                "sum": histogram.total,
                "sum_squares": histogram.squares,
                "bucket_limit": histogram.limits,
                "bucket": histogram.counts,
            }
            for tag, histogram in histograms.items()
        }
        write_gate_summaries(self.logger, scalars, fields, step)

    @override
    def log_picture(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self.logger.experiment.add_image(tag, pixels, step, dataformats="HWC")

    @override
    def log_html(self, tag: str, text: str, step: int) -> None:
        self.logger.experiment.add_text(tag, text, step)
