"""Pictures, histograms and texts in MLflow (extra ``mlflow``)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from lightning.pytorch.loggers import MLFlowLogger
from typing_extensions import override

from gatera_lightning.callbacks.run_logs.base import Histogram, RunLog


@dataclass(frozen=True)
class MLFlowLog(RunLog):
    """Writes to an MLflow logger.

    MLflow has no histograms: their counts are the JSON artifact ``gate_histograms/step_<step>.json``, by tag.
    A text is the artifact ``<tag>/step_<step>.html``.
    """

    logger: MLFlowLogger

    @override
    def log_statistics(
        self, scalars: Mapping[str, float], histograms: Mapping[str, Histogram], step: int
    ) -> None:
        self.logger.log_metrics(scalars, step)
        counts = {tag: asdict(histogram) for tag, histogram in histograms.items()}
        self.logger.experiment.log_dict(self._run, counts, f"gate_histograms/step_{step:08d}.json")

    @override
    def log_picture(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self.logger.experiment.log_image(self._run, pixels, key=tag, step=step)

    @override
    def log_html(self, tag: str, text: str, step: int) -> None:
        page = f'<!doctype html><meta charset="utf-8">{text}\n'
        self.logger.experiment.log_text(self._run, page, f"{tag}/step_{step:08d}.html")

    @property
    def _run(self) -> str:
        run = self.logger.run_id
        assert run is not None  # the logger starts a run when it is asked for its id
        return run
