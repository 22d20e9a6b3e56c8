"""Store the linear layers of a backbone in fewer bits, and read backbones that others have stored so."""

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.fingerprint import weight_fingerprint
from gatera_lightning.adapters.packed_weight import PackedWeight
from gatera_lightning.adapters.storages import STORAGES
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)


@torch.no_grad()
def quantize_linear_layers(model: PreTrainedModel, storage: str) -> int:
    """Pack the weights of all linear layers except the output head, in place; one dense copy at a time.

    A weight that linear layers share is packed once. A weight that another module reads too, such as an
    embedding, stays as it is.

    Args:
        model: A model with dense weights; it may be on the meta device.
        storage: A name in :data:`~gatera_lightning.adapters.storages.STORAGES`.

    Returns:
        The number of weights that were packed.
    """
    head = model.get_output_embeddings()
    owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter].append(module)
    packable = {
        weight: modules
        for weight, modules in owners.items()
        if all(isinstance(m, nn.Linear) and m is not head and m.weight is weight for m in modules)
    }
    count = len(packable)
    owners.clear()
    while packable:  # each dense weight is freed before the next one is packed
        weight, modules = packable.popitem()
        packed = PackedWeight.pack(weight, storage, None if weight.is_meta else weight_fingerprint(weight))
        parameter = nn.Parameter(packed, requires_grad=False)
        for module in modules:
            module.weight = parameter
        del weight
    return count


def read_quantized_layers(model: PreTrainedModel) -> set[str]:
    """Bring layers that Transformers has loaded quantized into the form that adapters need, in place.

    Each becomes an ``nn.Linear`` with a :class:`~gatera_lightning.adapters.packed_weight.PackedWeight`, so
    its output no longer depends on the library's own matmul, which may round its inputs as well.

    Returns:
        The names of the storages that were found.
    """
    found: set[str] = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, nn.Linear):
                continue
            for storage in STORAGES.values():
                packed = storage.read_layer(child)
                if packed is not None:
                    found.add(storage.name)
                    setattr(
                        parent,
                        name,
                        _plain_linear(
                            child,
                            PackedWeight(
                                storage.name,
                                packed,
                                torch.Size((child.out_features, child.in_features)),
                                model.dtype,
                            ),
                        ),
                    )
                    break
    if found:
        # The model is no longer what its config says: Transformers would refuse to move or cast it.
        del model.config.quantization_config
        own: Any = model
        own.is_quantized, own.hf_quantizer = False, None
    return found


def _plain_linear(layer: nn.Linear, weight: PackedWeight) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


@torch.no_grad()
def dequantize_linear_layers(model: nn.Module) -> None:
    """Replace every packed weight by a dense one, in place; outputs stay the same."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, PackedWeight):
                if parameter not in done:
                    done[parameter] = nn.Parameter(parameter.dense(), requires_grad=False)
                module._parameters[name] = done[parameter]


def quantization_problem(name: str) -> str | None:
    """Say that a storage's package is missing, as a problem of ``backbone.quantization``; imports nothing."""
    if name not in STORAGES or (problem := STORAGES[name].problem()) is None:
        return None
    return f"backbone.quantization: {problem}"


def stored_quantization(hf_config: Any) -> str | None:
    """Return the storage in which a backbone's weights already are, by its ``config.json``.

    Returns:
        Its name; None for dense weights, and for weights of another form, which cannot be adapted.
    """
    return next(iter(_stored(hf_config)[1]), None)


def check_stored_quantization(
    hf_config: Any, backbone_id: str, quantization: str, *, compiles: bool = False
) -> None:
    """Check what a backbone's ``config.json`` says about its weights, before they are read.

    Raises:
        ConfigError: If they are quantized and the setting asks for something else, or the model shall be
            compiled, or they need a missing package.
    """
    method, accepted = _stored(hf_config)
    if method is None:
        return
    if quantization != "none" and quantization not in accepted:
        raise ConfigError(
            f"backbone.quantization: {quantization!r}, but the weights of {backbone_id!r} are already "
            f"quantized (config.json: {method}{f', which is {accepted[0]}' if len(accepted) == 1 else ''}); "
            f"accepted: {', '.join(('none', *accepted))}, or the dense weights of this model"
        )
    if accepted and compiles:
        raise ConfigError(
            f"backbone.compile: true, but the weights of {backbone_id!r} are quantized ({accepted[0]}); "
            "accepted: false"
        )
    for name in accepted:
        if problem := STORAGES[name].problem():
            raise ConfigError(f"backbone.id: the weights of {backbone_id!r} are stored as {problem}")


def _stored(hf_config: Any) -> tuple[str | None, tuple[str, ...]]:
    """Return the method that a config names, None for dense weights, and the storage that it stands for."""
    stored = getattr(hf_config, "quantization_config", None)
    if stored is None:
        return None, ()
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(settings.get("quant_method", "")).rpartition(".")[2].lower()
    return method, _names(method, settings)


def _names(method: str, settings: dict[str, Any]) -> tuple[str, ...]:
    if method == "torchao":
        return ("torchao_int8",)
    if method == "quanto":
        return tuple(name for name in (f"quanto_{settings.get('weights')}",) if name in STORAGES)
    if method != "bitsandbytes":
        return ()
    if settings.get("load_in_8bit"):
        return ("int8",)
    if settings.get("bnb_4bit_quant_type") == "fp4":
        return ()
    return ("nf4_double",) if settings.get("bnb_4bit_use_double_quant") else ("nf4",)
