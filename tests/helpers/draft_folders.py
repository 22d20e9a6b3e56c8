"""Folders of untrained draft adapters, and models to draft for."""

import torch

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters, save_adapter
from gatera_lightning.adapters.serialization import read_adapter
from gatera_lightning.peft.own_methods import write_peft_method

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def draft_folder(model, folder, size=0.3, peft=False, **settings):
    """Save a random LoRA behind a position gate for a fresh model, which this adapts."""
    config = AdapterConfig(
        **(
            {"update": "lora", "gate": "position", "rank": 4, "alpha": 8, "target_modules": ALL_SEVEN}
            | settings
        )
    )
    inject_adapters(model, config, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    save_adapter(model, folder)
    if peft:
        stored, tensors = read_adapter(folder)
        for file in folder.iterdir():
            file.unlink()
        write_peft_method(folder, tensors, stored.config, stored.origin)
    return folder
