"""Data: tasks turn rows into prompts with answers, which are tokenized and arranged in batches."""

import warnings
from typing import Any

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.tasks.base import TaskDataModule
from gatera_lightning.datamodules.tasks.commonsense import CommonsenseDataModule
from gatera_lightning.datamodules.tasks.dialogue import DialogueDataModule
from gatera_lightning.datamodules.tasks.instruction import InstructionDataModule
from gatera_lightning.datamodules.tasks.math import MathDataModule

__all__ = [
    "Batch",
    "CommonsenseDataModule",
    "DialogueDataModule",
    "Example",
    "InstructionDataModule",
    "MathDataModule",
    "SupervisedDataModule",
    "TaskDataModule",
]

_RENAMED = {"OwnDataModule": "InstructionDataModule", "TaskFamily": "TaskDataModule"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # FutureWarning, not DeprecationWarning: the names stand in YAML files, whose authors should see this.
    warnings.warn(
        f"{__name__}.{name} is now called {_RENAMED[name]}; the old name goes away in 0.3",
        FutureWarning,
        stacklevel=2,
    )
    return globals()[_RENAMED[name]]
