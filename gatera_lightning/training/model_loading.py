"""Load a backbone and put an adapter into it, ready to train."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.injection import InjectionReport, inject_adapters
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.backbone.compilation import compile_layers
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.distributed.sharded_loading import load_sharded
from gatera_lightning.distributed.sharding import AdapterShardingStrategy


def load_adapted_model(
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    *,
    strategy: Any,
    device: torch.device,
    warm_start: str | None,
) -> tuple[PreTrainedModel, InjectionReport]:
    """Load the backbone, inject the adapter, and shard both under AdapterShardingStrategy.

    The adapter's initial values are drawn from the seed of ``seed_everything``, so that they are the same on
    every rank.

    Args:
        backbone: The frozen model.
        adapter: The adapter.
        strategy: The trainer's strategy; None without a trainer.
        device: Where the model will run, which decides the dtype ``auto``.
        warm_start: An adapter folder to take the adapter's values from.

    Returns:
        The model in training mode, on the CPU unless it is sharded, and what was injected.

    Raises:
        ConfigError: If a setting does not fit the model.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    if isinstance(strategy, AdapterShardingStrategy):
        model, report = load_sharded(backbone, adapter, strategy, seed=seed, warm_start=warm_start)
    else:
        model = load_backbone(backbone, device.type)
        report = inject_adapters(model, adapter, torch.Generator().manual_seed(seed))
        if warm_start is not None:
            load_adapter(model, warm_start)
    if backbone.compile:
        compile_layers(model)
    model.train()  # Hugging Face returns eval mode, which turns off dropout and gradient checkpointing
    return model, report
