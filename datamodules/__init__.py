"""Data: tasks turn rows into prompts with answers, which are tokenized and arranged in batches.

Names are imported on first use: a training loop without Lightning needs :class:`Batch` only.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatera_lightning.datamodules.base import SupervisedDataModule as SupervisedDataModule
    from gatera_lightning.datamodules.batch import Batch as Batch
    from gatera_lightning.datamodules.example import Example as Example
    from gatera_lightning.datamodules.tasks.base import TaskDataModule as TaskDataModule
    from gatera_lightning.datamodules.tasks.commonsense import CommonsenseDataModule as CommonsenseDataModule
    from gatera_lightning.datamodules.tasks.dialogue import DialogueDataModule as DialogueDataModule
    from gatera_lightning.datamodules.tasks.instruction import InstructionDataModule as InstructionDataModule
    from gatera_lightning.datamodules.tasks.math import MathDataModule as MathDataModule

_MODULES = {
    "Batch": "batch",
    "CommonsenseDataModule": "tasks.commonsense",
    "DialogueDataModule": "tasks.dialogue",
    "Example": "example",
    "InstructionDataModule": "tasks.instruction",
    "MathDataModule": "tasks.math",
    "SupervisedDataModule": "base",
    "TaskDataModule": "tasks.base",
}
"""Public name -> the module below this package that defines it."""

_RENAMED = {"OwnDataModule": "InstructionDataModule", "TaskFamily": "TaskDataModule"}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        # FutureWarning, not DeprecationWarning: the names stand in YAML files, whose authors should see this.
        warnings.warn(
            f"{__name__}.{name} is now called {_RENAMED[name]}; the old name goes away in 0.3",
            FutureWarning,
            stacklevel=2,
        )
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # found by a plain lookup next time
    return value


def __dir__() -> list[str]:
    return __all__
