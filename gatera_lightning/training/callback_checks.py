"""Refuse callbacks that change what an optimizer step consists of while the run is going."""

from collections.abc import Iterable
from typing import Any

from gatera_lightning.errors import ConfigError

_PLAN = "the totals of every step are planned before it starts"

REFUSED_CALLBACKS = {
    "GradientAccumulationScheduler": f"{_PLAN}; accepted: trainer.accumulate_grad_batches",
    "BatchSizeFinder": f"{_PLAN}; accepted: data.batch_size (`estimate` predicts the memory of a step)",
    "LearningRateFinder": "its steps would not follow the schedule; accepted: model.optimizer.lr",
    "BaseFinetuning": "the backbone stays frozen; accepted: model.adapter.target_modules and layers",
    "ModelPruning": "the update is trained as it is; accepted: model.adapter.rank",
    "StochasticWeightAveraging": "it replaces the schedule and the weights; accepted: model.optimizer",
    "WeightAveraging": "checkpoints and adapter folders would hold different weights; accepted: none",
}
"""Callback of Lightning -> why a run cannot have it, and what is accepted. Subclasses are refused too."""


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raise ConfigError with all callbacks of a Trainer that cannot be used."""
    if problems := callback_problems(callbacks):
        raise ConfigError(problems)


def callback_problems(callbacks: Iterable[Any]) -> list[str]:
    """Return one message for every callback that cannot be used.

    Args:
        callbacks: The callbacks of a Trainer.
    """
    problems = []
    for callback in callbacks:
        names = [cls.__name__ for cls in type(callback).__mro__ if "lightning" in cls.__module__]
        if found := next((name for name in names if name in REFUSED_CALLBACKS), None):
            problems.append(f"trainer.callbacks: {type(callback).__name__}: {REFUSED_CALLBACKS[found]}")
    return problems
