"""Data: rows become prompts and answers, prompts become tokens and masks, tokens become planned optimizer steps."""

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.tasks.commonsense import CommonsenseDataModule
from gatera_lightning.datamodules.tasks.dialogue import DialogueDataModule
from gatera_lightning.datamodules.tasks.instruction import OwnDataModule
from gatera_lightning.datamodules.tasks.math import MathDataModule

__all__ = [
    "Batch",
    "CommonsenseDataModule",
    "DialogueDataModule",
    "Example",
    "MathDataModule",
    "OwnDataModule",
    "SupervisedDataModule",
]
