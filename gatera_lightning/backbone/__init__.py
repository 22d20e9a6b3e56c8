"""The frozen model: loading it, probing what it does, and running it with less memory and time."""

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
