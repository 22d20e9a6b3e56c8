"""Adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, loadable without Lightning or pickle."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import backbone_fingerprint
from gatera_lightning.adapters.injection import (
    adapted_linears,
    adapter_parameters,
    inject_adapters,
    replace_module,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1


class AdapterFileError(ValueError):
    """An adapter folder is incomplete, damaged, or belongs to another backbone or shape."""


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    template: str | None = None,
) -> Path:
    """Write the adapter of ``model`` to ``folder``; each file appears whole or not at all.

    ``backbone`` and ``revision`` say where the frozen weights came from (default: what the Hugging Face config
    knows); the fingerprint of the adapted weights is what loading checks. ``template`` is how the prompts of the training
    were written, which ``chat`` and ``generate`` take up. In a sharded model every rank must call
    this (parameters are gathered one by one, the backbone never), and rank 0 writes.
    Raises ValueError when the model has no adapter.
    """
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapted layers")
    tensors = {name: _whole(parameter) for name, parameter in adapter_parameters(model).items()}
    folder = Path(folder)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return folder
    hf_config = getattr(model, "config", None)
    origin = {
        "id": backbone or getattr(hf_config, "_name_or_path", None) or None,
        "revision": revision or getattr(hf_config, "_commit_hash", None),
        "fingerprint": backbone_identity(model),
    }
    return write_adapter(folder, tensors, next(iter(layers.values())).config, origin, template)


def write_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    config: AdapterConfig,
    origin: dict[str, Any],
    template: str | None,
) -> Path:
    """Write an adapter folder of whole CPU tensors; each file appears whole or not at all.

    ``origin`` says of the backbone its id, revision and fingerprint.
    """
    description = {"format_version": FORMAT_VERSION, "adapter": asdict(config), "backbone": origin}
    if template is not None:
        description["template"] = template
    folder.mkdir(parents=True, exist_ok=True)
    weights_draft, config_draft = folder / f"{WEIGHTS_FILE}.tmp", folder / f"{CONFIG_FILE}.tmp"
    save_file(tensors, weights_draft, metadata={"format": "pt"})
    config_draft.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(weights_draft, folder / WEIGHTS_FILE)
    os.replace(config_draft, folder / CONFIG_FILE)
    return folder


def read_adapter_config(folder: str | Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """The AdapterConfig of a folder and what it says of its backbone (id, revision, fingerprint).

    Raises AdapterFileError when the file is missing, malformed or from a newer version.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder}: no adapter here ({CONFIG_FILE} is missing)")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f"{path}: malformed, not JSON ({error})") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise AdapterFileError(f"{path}: malformed, not an adapter's description: {str(description)[:60]!r}")
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise AdapterFileError(f"{path}: format_version {version!r}; this version reads {FORMAT_VERSION}")
    values, origin = description.get("adapter"), description.get("backbone")
    known = AdapterConfig.__dataclass_fields__
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{path}: malformed: 'adapter' is {values!r}; accepted: a table of {', '.join(known)}"
        )
    if set(values) - set(known):
        unknown = sorted(set(values) - set(known))
        raise AdapterFileError(f"{path}: unknown adapter settings {unknown}; accepted: {', '.join(known)}")
    if not isinstance(origin, dict) or {"id", "revision", "fingerprint"} - set(origin):
        raise AdapterFileError(
            f"{path}: malformed: 'backbone' is {origin!r}; it must hold id, revision, fingerprint"
        )
    config = AdapterConfig(**values)
    if config.problems():
        raise AdapterFileError(f"{path}: {'; '.join(config.problems())}")
    return config, origin


def trained_template(folder: str | Path) -> str | None:
    """How the prompts were written that an adapter was trained on; None where its folder does not say."""
    template = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8")).get("template")
    return template if isinstance(template, str) else None


def load_adapter(model: nn.Module, folder: str | Path) -> AdapterConfig:
    """Load an adapter folder into ``model``, injecting the adapter first if the model has none; returns its config.

    Nothing is unpickled. Raises AdapterFileError when a file is missing or damaged, the backbone's fingerprint differs,
    or names, shapes or dtypes do not match, and ConfigError when the adapter cannot be injected; the model is as it was
    before then.
    """
    config, origin = read_adapter_config(folder)
    tensors = _read_tensors(Path(folder) / WEIGHTS_FILE)
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    injected = not adapted_linears(model)
    if injected:
        inject_adapters(model, config)
    try:
        check_fit(model, config, origin, tensors, folder)
    except AdapterFileError:
        if injected:
            for name, layer in adapted_linears(model).items():
                replace_module(model, name, layer.base)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(was_trainable[name])
        raise
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[name])
    return config


def check_fit(
    model: nn.Module,
    config: AdapterConfig,
    origin: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: str | Path,
) -> None:
    """Raise AdapterFileError, which begins with ``folder``, unless method, names, shapes, dtypes and backbone agree."""
    layers = adapted_linears(model)
    own = next(iter(layers.values())).config
    if (own.update, own.gate, own.rank, own.scale) != (config.update, config.gate, config.rank, config.scale):
        raise AdapterFileError(
            f"{folder}: holds update={config.update} gate={config.gate} rank={config.rank} scale={config.scale:g}, but the "
            f"model was adapted with update={own.update} gate={own.gate} rank={own.rank} scale={own.scale:g}"
        )
    problems = _mismatches(adapter_parameters(model), tensors)
    if problems:
        raise AdapterFileError(f"{folder}: does not fit this model: {'; '.join(problems)}")
    fingerprint = backbone_identity(model)
    if fingerprint != origin["fingerprint"]:
        raise AdapterFileError(
            f"{folder}: was trained on another backbone ({origin['id']}, revision {origin['revision']}): the adapted "
            f"weights differ (fingerprint {str(origin['fingerprint'])[:12]}… there, {fingerprint[:12]}… here). "
            "A base model and its instruct version are different backbones."
        )


def backbone_identity(model: nn.Module) -> str:
    """The fingerprint of the frozen weights under the adapter of ``model``."""
    return backbone_fingerprint(
        {name: layer.base_fingerprint for name, layer in adapted_linears(model).items()}
    )


def adapter_identity(model: nn.Module) -> str:
    """SHA-256 over the names and values of the adapter's parameters; in a sharded model every rank must call this."""
    digest = hashlib.sha256()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # a sharded parameter cannot be detached in Lightning's inference mode
        for name, parameter in sorted(adapter_parameters(model).items()):
            digest.update(name.encode())
            digest.update(_whole(parameter).flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(parameter: nn.Parameter) -> Tensor:
    """A parameter as one CPU tensor; a collective when it is sharded."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterFileError(f"{path.parent}: incomplete ({WEIGHTS_FILE} is missing)")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path}: damaged, not a readable safetensors file ({error})") from error


def _mismatches(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> list[str]:
    """What keeps ``tensors`` from fitting ``parameters``: at most one example of each kind, with the count."""
    problems = []
    missing, surplus = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing:
        problems.append(f"{len(missing)} parameters are not in the file ({missing[0]}, …)")
    if surplus:
        problems.append(f"{len(surplus)} tensors have no place in the model ({surplus[0]}, …)")
    for name in sorted(set(parameters) & set(tensors)):
        here, there = parameters[name], tensors[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            problems.append(
                f"{name} is {tuple(there.shape)} {there.dtype} there, {tuple(here.shape)} {here.dtype} here"
            )
            break
    return problems
