"""Means over the validation split that objectives measure themselves."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.base import Objective


class ObjectiveMeans(nn.Module):
    """One mean for each of the objectives' ``validation_names``; a collective when it is logged.

    Their ``names_by_task`` have further means, one for each task, if there are several.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self._objectives = [objective for objective in objectives if objective.validation_names]
        self._by_name: dict[str, MeanMetric] = {}
        self.reset({})

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
        examples = batch["example_ids"].tolist()
        of_tasks = {  # of every task, so that all ranks log the same names
            task: [row for row, example in enumerate(examples) if self._tasks.get(example) == task]
            for task in sorted(set(self._tasks.values()))
        }
        for objective in self._objectives:
            for name, part in objective.validate(model, batch).items():
                total, count = part.total, torch.as_tensor(part.count, device=part.total.device)
                self._add(f"val/{name}", total.sum(), count.sum())
                for task, chosen in of_tasks.items() if name in objective.names_by_task else ():
                    self._add(f"val/{name}/{task}", total[chosen].sum(), count[chosen].sum())
        return dict(self._by_name)

    def reset(self, tasks: Mapping[int, str]) -> None:
        """Forget all batches.

        Args:
            tasks: The task of each example of the validation split; empty if there is a single one.
        """
        self._tasks = tasks
        names = validation_names(self._objectives, tasks.values())
        # Lightning remembers the metrics that a run has logged, so each stays as long as its name does.
        self._by_name = {name: self._by_name.get(name, _new_mean()) for name in names}
        self.means = nn.ModuleList(self._by_name.values())  # Lightning logs submodules only
        for mean in self._by_name.values():
            mean.reset()

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        # Without elements too: a metric that is never updated warns when it is logged.
        mean = self._by_name[name].to(total.device)
        mean.update(total / count.clamp_min(1), weight=count)


def validation_names(objectives: Iterable[Objective], tasks: Iterable[str]) -> list[str]:
    """Return the names under which the objectives' own measures of the validation split are logged."""
    own, by_task = list[str](), list[str]()
    for objective in objectives:
        own += [f"val/{name}" for name in objective.validation_names]
        by_task += [f"val/{name}" for name in objective.names_by_task]
    return own + [f"{name}/{task}" for task in sorted(set(tasks)) for name in by_task]


def _new_mean() -> MeanMetric:
    return MeanMetric(nan_strategy=float("inf"))
