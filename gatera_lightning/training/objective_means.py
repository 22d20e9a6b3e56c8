"""Means over the validation split that objectives measure themselves."""

from collections.abc import Sequence
from typing import cast

from torch import nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.base import Objective


class ObjectiveMeans(nn.Module):
    """One mean for each of the objectives' ``validation_names``; a collective when it is logged."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self._objectives = [objective for objective in objectives if objective.validation_names]
        names = [f"val/{name}" for objective in self._objectives for name in objective.validation_names]
        self.means = nn.ModuleDict({name: MeanMetric(nan_strategy=float("inf")) for name in names})

    @property
    def are_measured(self) -> bool:
        """Whether an objective measures the validation split."""
        return bool(self._objectives)

    def update(self, model: PreTrainedModel, batch: Batch) -> dict[str, MeanMetric]:
        """Add a batch.

        Args:
            model: The adapted model.
            batch: A batch of the validation split.

        Returns:
            All means by the name to log them under; every rank has the same.
        """
        for objective in self._objectives:
            for name, part in objective.validate(model, batch).items():
                # Without elements too: a metric that is never updated warns when it is logged.
                self._mean(f"val/{name}").update(part.total / max(1, part.count), weight=part.count)
        return {name: self._mean(name) for name in self.means}

    def reset(self) -> None:
        """Forget all batches."""
        for name in self.means:
            self._mean(name).reset()

    def _mean(self, name: str) -> MeanMetric:
        return cast(MeanMetric, self.means[name])
