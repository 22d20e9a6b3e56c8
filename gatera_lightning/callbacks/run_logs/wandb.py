"""Pictures, histograms and texts in Weights & Biases (extra ``wandb``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from gatera_lightning.callbacks.run_logs.base import Histogram, RunLog


@dataclass(frozen=True)
class WandbLog(RunLog):
    """Writes to a logger of Weights & Biases, with the optimizer step as ``trainer/global_step``.

    A text has ``/text`` behind its tag, because a key of Weights & Biases has one kind of values.
    """

    logger: WandbLogger

    @override
    def log_statistics(
        self, scalars: Mapping[str, float], histograms: Mapping[str, Histogram], step: int
    ) -> None:
        import wandb

        values: dict[str, Any] = dict(scalars)
        for tag, histogram in histograms.items():
            edges = np.concatenate([[0.0], histogram.limits])
            values[tag] = wandb.Histogram(np_histogram=(np.asarray(histogram.counts), edges))
        self.logger.log_metrics(values, step)

    @override
    def log_picture(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self.logger.log_image(tag, [pixels], step)

    @override
    def log_html(self, tag: str, text: str, step: int) -> None:
        import wandb

        values: dict[str, Any] = {f"{tag}/text": wandb.Html(text, data_is_not_path=True)}
        self.logger.log_metrics(values, step)
