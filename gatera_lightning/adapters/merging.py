"""Merge an adapter into its backbone, if the gate allows it."""

import warnings

import torch
from torch import nn

from gatera_lightning.adapters.injection import remove_adapters
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.errors import checks_arguments


@checks_arguments
@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Replace every adapted layer by an ``nn.Linear`` with the weight ``W = W0 + g·ΔW``, in place.

    Computed in the adapter's dtype and rounded once to the backbone's. In bfloat16, changes below about 0.4 %
    of a weight are lost, and a warning says so. A layer whose weight other layers share gets a weight of its
    own.

    Args:
        model: A model with an adapter whose gates do not depend on the token, such as ``none`` or ``static``.

    Returns:
        The same model.

    Raises:
        ValueError: If a gate depends on the token, an adapted layer computes more than ``W0 x + b``, or the
            model has no adapter; the model is then unchanged.
    """
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("merge_adapter: the model has no adapted layers")
    for name, layer in layers.items():
        if layer.gate is not None and layer.gate.depends_on_token:
            raise ValueError(
                f"merge_adapter: {name} has a {layer.config.gate.kind!r} gate, whose value differs between "
                "tokens, so no single matrix equals it. Only gates that do not depend on the token "
                "merge ('none', 'static'); keep the adapter folder instead."
            )
        if not has_plain_forward(layer.base):
            raise ValueError(
                f"merge_adapter: {name} has hooks or a forward of its own, so its output is not a "
                "matrix times its input. Remove the hooks (accelerate's with "
                "accelerate.hooks.remove_hook_from_module), or keep the adapter folder instead."
            )
    dtypes = {layer.base.weight.dtype for layer in layers.values()}
    if dtypes & {torch.bfloat16, torch.float16}:
        warnings.warn(
            "merging into 16-bit weights: changes smaller than the weight's rounding step are lost; "
            "load the backbone in float32 to merge exactly",
            stacklevel=2,
        )
    for layer in layers.values():
        delta = layer.update.delta_weight(layer.base.weight)  # (out, in)
        if layer.gate is not None:
            delta = delta * layer.gate.constant_value()
        merged = layer.base.weight.to(delta.dtype) + delta
        # Not in place: another layer, the embeddings or another model may share this weight.
        layer.base.weight = nn.Parameter(merged.to(layer.base.weight.dtype), requires_grad=False)
    remove_adapters(model)
    return model
