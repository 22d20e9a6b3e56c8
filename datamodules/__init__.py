"""Data: rows become prompts and answers, prompts become tokens and masks, tokens become planned optimizer steps."""

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.commonsense import CommonsenseDataModule
from gatera_lightning.datamodules.dialogue import DialogueDataModule
from gatera_lightning.datamodules.math import MathDataModule
from gatera_lightning.datamodules.own_data import OwnDataModule
from gatera_lightning.datamodules.tokens import Batch, Example

__all__ = [
    "Batch",
    "CommonsenseDataModule",
    "DialogueDataModule",
    "Example",
    "MathDataModule",
    "OwnDataModule",
    "SupervisedDataModule",
]
