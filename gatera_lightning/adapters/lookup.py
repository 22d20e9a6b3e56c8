"""Find the adapted layers of a model and the adapter's parameters."""

from typing import Any, cast

from torch import nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.mask_drafts import MaskDrafts
from gatera_lightning.errors import checks_arguments


def adapted_linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the layers with an active adapter by name, in model order; not those frozen with the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and module.is_active and module.frozen_digest is None
    }


def frozen_adapter(model: nn.Module) -> tuple[AdapterConfig, str] | None:
    """Return the settings and the digest of the adapter that is part of the frozen model, if there is one."""
    layers = (module for module in model.modules() if isinstance(module, AdaptedLinear))
    found = ((layer.config, layer.frozen_digest) for layer in layers)
    return next(((config, digest) for config, digest in found if digest is not None), None)


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What torch.compile and checkpoint wrappers insert into the names of the modules inside them."""


def own_name(name: str) -> str:
    """Return the name that a module or parameter has without wrappers around it or its parents."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers that train it in parallel, and inside a PeftModel."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else cast(nn.Module, get_base_model())


def has_token_gates(model: nn.Module) -> bool:
    """Return whether any adapted layer has a gate that depends on the token, other than by a given mask."""
    gates = (layer.gate for layer in adapted_linears(model).values())
    return any(gate is not None and gate.depends_on_token and not gate.selects_tokens for gate in gates)


def needs_masks(model: nn.Module) -> bool:
    """Return whether any adapted layer has a gate that takes a mask with every forward pass."""
    return any(layer.config.gate.needs_mask for layer in adapted_linears(model).values())


@checks_arguments
def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by full name; whatever trains, saves or counts them uses this."""
    in_layers = {
        f"{layer_name}.{name}" if layer_name else name: parameter
        for layer_name, layer in adapted_linears(model).items()
        for name, parameter in layer.adapter_params().items()
    }
    return in_layers | mask_draft_parameters(model)


def mask_draft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter that belong to no layer: mask embeddings and a sampler head."""
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, MaskDrafts)
        for name, parameter in module.named_parameters()
    }
