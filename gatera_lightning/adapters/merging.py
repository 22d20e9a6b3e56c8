"""Merge an adapter into its backbone, if the gate allows it."""

import warnings

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.identity import non_finite_problem
from gatera_lightning.adapters.injection import remove_adapters
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.linear_layers import has_plain_forward, is_modified
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.adapters.packed_weight import PackedWeight
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
        ValueError: If a gate depends on the token, an adapted layer computes more than ``W0 x + b``, a weight
            is on the meta device or computed from other tensors, a value is NaN or infinite, or the model
            has no adapter; the model is then unchanged.
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
        if is_modified(layer) or not has_plain_forward(layer.base):
            raise ValueError(
                f"merge_adapter: {name} has hooks or a forward of its own, so its output is not a "
                "matrix times its input. Remove the hooks (accelerate's with "
                "accelerate.hooks.remove_hook_from_module), or keep the adapter folder instead."
            )
        if problem := _weight_problem(name, layer):
            raise ValueError(f"merge_adapter: {problem}; the backbone is unchanged")
    if problem := non_finite_problem(adapter_parameters(model)):
        raise ValueError(f"merge_adapter: {problem}; the backbone is unchanged")
    for name, layer in layers.items():
        if not torch.isfinite(_merged_weight(layer)).all():
            raise ValueError(
                f"merge_adapter: the merged weight of {name} has NaN or infinite values in "
                f"{layer.base.weight.dtype}; the backbone is unchanged. Load it in float32 to merge."
            )
    dtypes = {layer.base.weight.dtype for layer in layers.values()}
    if dtypes & {torch.bfloat16, torch.float16}:
        warnings.warn(
            "merging into 16-bit weights: changes smaller than the weight's rounding step are lost; "
            "load the backbone in float32 to merge exactly",
            stacklevel=2,
        )
    for layer in layers.values():
        # Not in place: another layer, the embeddings or another model may share this weight.
        layer.base.weight = nn.Parameter(_merged_weight(layer), requires_grad=False)
    remove_adapters(model)
    return model


def _weight_problem(name: str, layer: AdaptedLinear) -> str | None:
    """Describe why the weight of a layer cannot be replaced; None if it can."""
    weight = layer.base._parameters.get("weight")
    if weight is None:
        return (
            f"the weight of {name} is computed from other tensors (a parametrization such as weight_norm, or "
            "pruning); accepted: plain weights, as after torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(weight, PackedWeight):
        return (
            f"{name} is stored as {weight.storage_name}, which would round the merged weight; accepted: "
            "dense weights, as after gatera_lightning.backbone.quantization.dequantize_linear_layers(model), "
            "which keeps the outputs"
        )
    if any(tensor.is_meta for tensor in (weight, *layer.adapter_params().values())):
        return f"{name} is on the meta device and has no values; accepted: a model that is loaded"
    return None


def _merged_weight(layer: AdaptedLinear) -> Tensor:
    """Return ``W0 + g·ΔW``, (out, in), in the frozen weight's dtype."""
    return exact_merged_weight(layer).to(layer.base.weight.dtype)


def exact_merged_weight(layer: AdaptedLinear) -> Tensor:
    """Return ``W0 + g·ΔW``, (out, in), in the wider dtype of the frozen weight and the adapter.

    Args:
        layer: A layer whose gate does not depend on the token.
    """
    weight = layer.base.weight
    delta = layer.update.delta_weight(weight)  # (out, in)
    if layer.gate is not None:
        delta = delta * layer.gate.constant_value()
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(wide) + delta
