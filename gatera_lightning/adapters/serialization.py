"""Save and load adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, no pickle."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.identity import (
    backbone_identity,
    check_fit,
    full_cpu_tensor,
    non_finite_problem,
)
from gatera_lightning.adapters.injection import inject_adapters, remove_adapters
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters, own_name, unwrapped
from gatera_lightning.checkpointing.atomic_files import atomic_file
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.errors import AdapterFileError, ConfigError, checks_arguments, unknown_value

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 3
"""Version of ``adapter_config.json``. Also read: 1, with flat names for the gate's settings, and 2; both have
no digest of the weights file, and fingerprints of version 1."""


@checks_arguments
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    template: str | None = None,
) -> Path:
    """Save the adapter of a model to a folder; each file is replaced atomically.

    Every rank of a sharded model must call this: the adapter's parameters are gathered one by one, and rank 0
    writes. The backbone is not saved; loading checks its fingerprint. The names of tensors do not depend on
    torch.compile or DDP, and a cast of the model to a 16-bit dtype does not change the dtype of the file.

    Args:
        model: A model with an adapter.
        folder: The folder to write.
        backbone: Where the frozen weights came from; None takes it from the model's Hugging Face config.
        revision: Their revision; None takes it from the model's Hugging Face config.
        template: The prompt template of the training data, which ``chat`` and ``generate`` use.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no adapter.
        AdapterFileError: If a value is NaN or infinite, or the folder holds a model; nothing is written.
    """
    model = unwrapped(model)
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapted layers")
    tensors = {
        own_name(name): full_cpu_tensor(parameter) for name, parameter in adapter_parameters(model).items()
    }
    folder = Path(folder)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return folder
    hf_config = getattr(model, "config", None)
    origin = {
        "id": backbone or getattr(hf_config, "_name_or_path", None) or None,
        "revision": revision or getattr(hf_config, "_commit_hash", None),
        "fingerprint": backbone_identity(model),
        "attn_implementation": getattr(hf_config, "_attn_implementation", None),
    }
    config = next(iter(layers.values())).config
    dtype = reduce(
        torch.promote_types, (t.dtype for t in tensors.values()), getattr(torch, config.adapter_dtype)
    )
    settings: dict[str, Any] = {"adapter_dtype": str(dtype).removeprefix("torch.")}
    config = replace(config, **settings)
    return write_adapter(folder, {name: t.to(dtype) for name, t in tensors.items()}, config, origin, template)


def write_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    config: AdapterConfig,
    origin: dict[str, Any],
    template: str | None,
) -> Path:
    """Write an adapter folder; each file is replaced atomically.

    Args:
        folder: The folder to write.
        tensors: Unsharded CPU tensors, by parameter name.
        config: The adapter's settings.
        origin: The ``id``, ``revision`` and ``fingerprint`` of the backbone.
        template: The prompt template of the training data, if known.

    Returns:
        The folder.

    Raises:
        AdapterFileError: If a value is NaN or infinite, or the folder holds a model; nothing is written.
    """
    if problem := non_finite_problem(tensors):
        raise AdapterFileError(f"{folder}: the adapter is not saved, because {problem}")
    if (folder / "config.json").exists():
        raise AdapterFileError(
            f"{folder}: the adapter is not saved, because this folder holds a model (config.json), which an "
            f"{CONFIG_FILE} beside it would break; accepted: a folder of its own"
        )
    weights = save(tensors, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "adapter": config.to_dict(),
        "adapter_sha256": _settings_digest(config.to_dict()),
        "backbone": origin,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if template in get_args(Template):
        description["template"] = template
    elif template is not None:
        log.warning(
            "%s: the prompt template %r is not stored, because chat and generate know only %s",
            *(folder, template, ", ".join(get_args(Template))),
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / CONFIG_FILE) as config_file, atomic_file(folder / WEIGHTS_FILE) as weights_file:
        weights_file.write_bytes(weights)
        config_file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return folder


def read_adapter_config(folder: str | Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Read ``adapter_config.json``.

    Args:
        folder: An adapter folder.

    Returns:
        The adapter's settings, and the ``id``, ``revision`` and ``fingerprint`` of its backbone.

    Raises:
        AdapterFileError: If the file is missing, malformed or from a newer version.
    """
    path = Path(folder) / CONFIG_FILE
    description = _read_description(folder)
    version = description["format_version"]
    if version not in range(1, FORMAT_VERSION + 1):
        raise AdapterFileError(
            f"{path}: format_version {version!r}; this version reads 1 to {FORMAT_VERSION}"
        )
    values, origin = description.get("adapter"), description.get("backbone")
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path}: malformed: 'adapter' is {values!r}; accepted: a table of settings")
    if not isinstance(origin, dict) or {"id", "revision", "fingerprint"} - set(origin):
        raise AdapterFileError(
            f"{path}: malformed: 'backbone' is {origin!r}; accepted: a table of id, revision and fingerprint"
        )
    try:
        config = AdapterConfig.from_dict(values)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    if problems := config.problems():
        raise AdapterFileError(f"{path}: {'; '.join(problems)}")
    if version >= 3 and description.get("adapter_sha256") != _settings_digest(values):
        raise AdapterFileError(
            f"{path}: corrupt, or changed after it was saved: the SHA-256 of 'adapter' is not "
            "'adapter_sha256', so the weights were trained with other settings"
        )
    if "template" in description and description["template"] not in get_args(Template):
        problem = unknown_value("template", description["template"], get_args(Template))
        raise AdapterFileError(f"{path}: {problem}")
    return config, origin


def _settings_digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read_description(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder}: not an adapter folder ({CONFIG_FILE} is missing)")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: malformed, not JSON ({error})") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise AdapterFileError(f"{path}: malformed, not an adapter's description: {str(description)[:60]!r}")
    return description


def trained_template(folder: str | Path) -> str | None:
    """Return the prompt template an adapter was trained with; None if its folder does not say."""
    template = _read_description(folder).get("template")
    return template if isinstance(template, str) else None


@checks_arguments
def load_adapter(model: nn.Module, folder: str | Path) -> AdapterConfig:
    """Load an adapter folder into a model, after injecting the adapter if the model has none.

    Nothing is unpickled. If this raises, the model is unchanged.

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
    config, origin = read_adapter_config(folder)
    tensors = _read_tensors(Path(folder) / WEIGHTS_FILE, _read_description(folder))
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = adapted_linears(model)
    if any(layer.inference_path is not None or layer.update.is_prepared for layer in layers.values()):
        raise RuntimeError(
            "load_adapter: the model is inside prepared_for_inference, whose cached products belong to the "
            "present adapter; leave the block first"
        )
    injected = not layers
    if injected:
        inject_adapters(model, config)
    try:
        check_fit(model, config, origin, tensors, folder)
    except Exception:  # whatever it is, the model must be as it was
        if injected:
            remove_adapters(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(was_trainable[name])
        raise
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[own_name(name)])
    return config


def _read_tensors(path: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterFileError(f"{path.parent}: incomplete ({WEIGHTS_FILE} is missing)")
    try:
        weights = path.read_bytes()
        tensors = load(weights)
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path}: corrupt, not a readable safetensors file ({error})") from error
    digest = description.get("weights_sha256")
    if digest is None and description["format_version"] >= 3:
        raise AdapterFileError(f"{path.parent / CONFIG_FILE}: malformed: weights_sha256 is missing")
    if digest not in (None, hashlib.sha256(weights).hexdigest()):
        raise AdapterFileError(
            f"{path}: corrupt, or changed after it was saved: its SHA-256 is not the one in {CONFIG_FILE}"
        )
    return tensors
