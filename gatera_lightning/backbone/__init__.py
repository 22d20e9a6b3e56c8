"""The frozen model: loading it, probing what it does, and running it with less memory and time."""

from typing import Any

from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import (
    context_length,
    default_device,
    load_backbone,
    load_config,
    load_skeleton,
    load_tokenizer,
    native_dtype,
    prepare_for_training,
)
from gatera_lightning.backbone.source import hub_id
from gatera_lightning.compatibility import moved_modules

__all__ = [
    "BackboneConfig",
    "context_length",
    "default_device",
    "hub_id",
    "load_backbone",
    "load_config",
    "load_skeleton",
    "load_tokenizer",
    "native_dtype",
    "prepare_for_training",
]


def __getattr__(name: str) -> Any:
    """Find names that `gatera_lightning.backbone` had when it was a module; they are deprecated."""
    return moved_modules.renamed(__name__, name)
