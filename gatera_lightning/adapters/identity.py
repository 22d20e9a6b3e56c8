"""Identify a backbone and an adapter by their values, and check whether a stored adapter fits a model."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import backbone_fingerprint, fingerprint_version
from gatera_lightning.adapters.lookup import (
    adapted_linears,
    adapter_parameters,
    frozen_adapter,
    own_name,
)
from gatera_lightning.adapters.packed_weight import PackedWeight
from gatera_lightning.errors import AdapterFileError

log = logging.getLogger(__name__)


def backbone_identity(model: nn.Module, version: int = 2) -> str:
    """Return the fingerprint of the frozen weights of the adapted layers."""
    layers = {own_name(name): layer.base_fingerprint for name, layer in adapted_linears(model).items()}
    return backbone_fingerprint(layers, version)


def backbone_fingerprints(model: nn.Module) -> dict[str, str]:
    """Return the fingerprints of the frozen weights as they are stored beside an adapter.

    If the weights were quantized while they were loaded, ``quantization`` says how. If the frozen model has
    a trained adapter, ``adapter_sha256`` is its digest.
    """
    found = {"fingerprint": backbone_identity(model), "fingerprint_float16": backbone_identity(model, 3)}
    if (frozen := frozen_adapter(model)) is not None:
        found["adapter_sha256"] = frozen[1]
    storage = quantization_while_loading(_frozen_weights(model))
    return found if storage == "none" else found | {"quantization": storage}


def _frozen_weights(model: nn.Module) -> list[Tensor]:
    return [layer.base.weight for layer in adapted_linears(model).values()]


def quantization_while_loading(weights: Iterable[Tensor]) -> str:
    """Return how frozen weights were quantized while they were loaded, or none.

    It is none for weights that were stored quantized: they have no other form, and their own fingerprint.
    """
    packed = (w.storage_name for w in weights if isinstance(w, PackedWeight) and w.fingerprint is not None)
    return next(packed, "none")


def backbone_problem(own: Mapping[int, str], origin: Mapping[str, Any]) -> str | None:
    """Describe that a backbone is not the one that an adapter was trained on; None if it is.

    Args:
        own: The backbone's fingerprints by version.
        origin: The stored ``id``, ``revision`` and ``fingerprint`` of the adapter's backbone, and the
            fingerprint after a cast to float16, if it is stored.
    """
    stored = str(origin["fingerprint"])
    found = own[fingerprint_version(stored)]
    if found == stored or (own[3] and own[3] == origin.get("fingerprint_float16")):
        return None
    return (
        f"was trained on another backbone ({origin['id']}, revision {origin['revision']}): the adapted "
        f"weights differ (stored fingerprint {stored[:12]}…, this model's {found[:12]}…). A base model and "
        "its instruct version are different backbones."
    )


def non_finite_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor with NaN or infinite values and count all of them; None if all are finite."""
    found = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not found:
        return None
    others = f", and {len(found) - 1} other tensors," if len(found) > 1 else ""
    return f"{found[0]}{others} holds NaN or infinite values"


def adapter_identity(model: nn.Module) -> str:
    """Return the SHA-256 over the names and values of the adapter's parameters.

    Every rank of a sharded model must call this.
    """
    digest = hashlib.sha256()
    # A sharded parameter cannot be detached in the inference mode that Lightning turns on.
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in sorted(adapter_parameters(model).items()):
            digest.update(name.encode())
            digest.update(full_cpu_tensor(parameter).flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fit(
    model: nn.Module,
    config: AdapterConfig,
    origin: dict[str, Any],
    tensors: dict[str, Tensor],
    source: str | Path,
) -> None:
    """Check that a stored adapter fits an adapted model.

    An ungated adapter also fits a model with gates, which keep their values.

    Args:
        model: A model with an adapter.
        config: The stored adapter's settings.
        origin: The stored ``id``, ``revision`` and ``fingerprint`` of its backbone.
        tensors: The stored tensors, by parameter name.
        source: Where the adapter is stored, for the error message.

    Raises:
        AdapterFileError: If the method, the names, shapes or dtypes of the tensors, or the backbone differ,
            or a value is NaN or infinite.
    """
    own = next(iter(adapted_linears(model).values())).config
    keeps_gates = config.gate.kind == "none" and own.gate.kind != "none"
    for name, layer in adapted_linears(model).items():
        there, here = _method(config, own_name(name)), _method(layer.config, own_name(name))
        if there[keeps_gates:] != here[keeps_gates:]:
            where = f" in {own_name(name)}" if config.has_patterns or own.has_patterns else ""
            raise AdapterFileError(
                f"{source}: holds {_in_words(there)}{where}, but the model was adapted with {_in_words(here)}"
            )
    own_parameters = {own_name(name): parameter for name, parameter in adapter_parameters(model).items()}
    if keeps_gates:
        own_parameters = {n: p for n, p in own_parameters.items() if not is_gate_parameter(n)}
    problems = _mismatches(own_parameters, tensors)
    if problems:
        raise AdapterFileError(f"{source}: does not fit this model: {'; '.join(problems)}")
    if problem := non_finite_problem(tensors):
        raise AdapterFileError(f"{source}: {problem}; accepted: finite values")
    if origin["fingerprint"] is None:  # a folder of PEFT's own methods
        return
    fingerprints = {version: backbone_identity(model, version) for version in (1, 2, 3)}
    if problem := backbone_problem(fingerprints, origin):
        raise AdapterFileError(f"{source}: {problem}")
    warn_of_other_quantization(source, origin, _frozen_weights(model))


def warn_of_other_quantization(
    source: str | Path, origin: Mapping[str, Any], weights: Iterable[Tensor]
) -> None:
    """Log a warning if an adapter was trained over another quantization of its backbone."""
    trained_over, here = origin.get("quantization") or "none", quantization_while_loading(weights)
    if trained_over != here:
        log.warning(
            "%s: trained over this backbone with quantization %s, and loaded over it with quantization %s; "
            "the frozen weights differ by the error of the quantization",
            *(source, trained_over, here),
        )


def full_cpu_tensor(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values as one contiguous CPU tensor.

    Every rank must call this if the parameter is sharded.
    """
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous()


def is_gate_parameter(name: str) -> bool:
    """Return whether a parameter of an adapted model belongs to a gate, and not to an update."""
    return name.rfind(".gate.") > name.rfind(".update.")


def _method(config: AdapterConfig, name: str) -> tuple[str, str, int, float, dict[str, Any]]:
    """Return the gate, the update, the rank, the scale and the update's own settings of a layer."""
    return config.gate.kind, config.update, config.rank_of(name), config.scale_of(name), config.extra_settings


def _in_words(method: tuple[str, str, int, float, dict[str, Any]]) -> str:
    gate, update, rank, scale, extra = method
    words = [f"update={update} gate={gate} rank={rank} scale={scale!r}"]
    return " ".join([*words, *(f"{name}={value!r}" for name, value in extra.items())])


def _mismatches(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> list[str]:
    """Return how names, shapes and dtypes differ: one example and the count for each kind of difference."""
    problems = []
    missing, unexpected = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing:
        problems.append(f"{len(missing)} missing tensors ({missing[0]}, …)")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected tensors ({unexpected[0]}, …)")
    for name in sorted(set(parameters) & set(tensors)):
        own, stored = parameters[name], tensors[name]
        if own.shape != stored.shape or own.dtype != stored.dtype:
            problems.append(
                f"{name} is stored as {tuple(stored.shape)} {stored.dtype}, this model needs "
                f"{tuple(own.shape)} {own.dtype}"
            )
            break
    return problems
