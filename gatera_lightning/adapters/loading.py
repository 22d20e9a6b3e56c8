"""Load an adapter folder into a model."""

from pathlib import Path

import torch
from torch import nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.identity import check_fit
from gatera_lightning.adapters.injection import inject, remove_adapters
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters, own_name, unwrapped
from gatera_lightning.adapters.serialization import read_adapter
from gatera_lightning.errors import checks_arguments


@checks_arguments
def load_adapter(model: nn.Module, folder: str | Path) -> AdapterConfig:
    """Load an adapter folder into a model, after injecting the adapter if the model has none.

    Nothing is unpickled. If this raises, the model is unchanged. Folders of PEFT's own LoRA, DoRA and HiRA
    load as well. An ungated adapter loads into a model with gates too, whose gates keep their values: with
    ``bias=4.0`` they start open, with ``bias=-4.0`` closed.

    Args:
        model: The backbone that the adapter was trained on, or this backbone with an adapter of the same
            kind.
        folder: An adapter folder.

    Returns:
        The adapter's settings.

    Raises:
        AdapterFileError: If a file is missing or corrupt, the backbone differs, or names, shapes or dtypes do
            not match.
        ConfigError: If the adapter cannot be injected.
        RuntimeError: If the model is inside ``prepared_for_inference``.
    """
    model = unwrapped(model)
    stored, tensors = read_adapter(folder)
    config = stored.config
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = adapted_linears(model)
    if any(layer.inference_path is not None or layer.update.is_prepared for layer in layers.values()):
        raise RuntimeError(
            "load_adapter: the model is inside prepared_for_inference, whose cached products belong to the "
            "present adapter; leave the block first"
        )
    injected = not layers
    if injected:
        inject(model, config, stored=True)
    try:
        check_fit(model, config, stored.origin, tensors, folder)
    except Exception:  # whatever it is, the model must be as it was
        if injected:
            remove_adapters(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(was_trainable[name])
        raise
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if own_name(name) in tensors:  # gates that a folder without gates leaves as they are
                parameter.copy_(tensors[own_name(name)])
    return config
