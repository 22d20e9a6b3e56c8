"""Folding an adapter into its backbone, where the gate allows it."""

import warnings

import torch
from torch import nn

from gatera_lightning.adapters.injection import adapted_linears, replace_module


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Replace every adapted layer by a plain ``nn.Linear`` with ``W = W0 + g·ΔW``, in place; returns ``model``.

    Only a gate that is the same for every token can be folded: ``none`` (g = 1) and ``static``. Computed in the
    adapter's dtype and rounded once to the backbone's; in bf16 a change below about 0.4 % of a weight vanishes, and
    a warning says so. Raises ValueError for a token gate or a model without adapter.
    """
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("merge_adapter: the model has no adapted layers")
    for name, layer in layers.items():
        if layer.gate is not None and layer.gate.depends_on_token:
            raise ValueError(
                f"merge_adapter: {name} has a {layer.config.gate!r} gate, whose weight differs from token to token: no "
                "single matrix equals it. Only the gates 'none' and 'static' merge; keep the adapter folder instead."
            )
    dtypes = {layer.base.weight.dtype for layer in layers.values()}
    if dtypes & {torch.bfloat16, torch.float16}:
        warnings.warn(
            "merging into 16-bit weights: changes smaller than the weight's rounding step are lost; "
            "load the backbone in float32 to merge exactly",
            stacklevel=2,
        )
    for name, layer in layers.items():
        delta = layer.update.delta_weight(layer.base.weight)  # (out, in)
        if layer.gate is not None:
            delta = delta * torch.sigmoid(layer.gate.bias)
        merged = layer.base.weight.to(delta.dtype) + delta
        layer.base.weight.copy_(merged.to(layer.base.weight.dtype))
        replace_module(model, name, layer.base)
    return model
