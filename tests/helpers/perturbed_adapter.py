"""Adapters that differ from their initial values, as after training."""

import torch

from gatera_lightning import adapter_parameters


def perturb_adapter(model, size):
    """Add normal noise of standard deviation ``size`` to every adapter parameter, the same in every run."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model
