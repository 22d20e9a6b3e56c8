"""Save and load adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, no pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.identity import backbone_identity, check_fit, full_cpu_tensor
from gatera_lightning.adapters.injection import inject_adapters, remove_adapters
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.checkpointing.atomic_files import atomic_file
from gatera_lightning.errors import AdapterFileError, ConfigError, checks_arguments

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 2
"""Version of ``adapter_config.json``. Version 1, with flat names for the gate's settings, is still read."""


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
    writes. The backbone is not saved; loading checks its fingerprint.

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
    """
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapted layers")
    tensors = {name: full_cpu_tensor(parameter) for name, parameter in adapter_parameters(model).items()}
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
    """Write an adapter folder; each file is replaced atomically.

    Args:
        folder: The folder to write.
        tensors: Unsharded CPU tensors, by parameter name.
        config: The adapter's settings.
        origin: The ``id``, ``revision`` and ``fingerprint`` of the backbone.
        template: The prompt template of the training data, if known.

    Returns:
        The folder.
    """
    description = {"format_version": FORMAT_VERSION, "adapter": config.to_dict(), "backbone": origin}
    if template is not None:
        description["template"] = template
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / CONFIG_FILE) as config_file, atomic_file(folder / WEIGHTS_FILE) as weights_file:
        save_file(tensors, weights_file, metadata={"format": "pt"})
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
    if not path.is_file():
        raise AdapterFileError(f"{folder}: not an adapter folder ({CONFIG_FILE} is missing)")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f"{path}: malformed, not JSON ({error})") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise AdapterFileError(f"{path}: malformed, not an adapter's description: {str(description)[:60]!r}")
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
    return config, origin


def trained_template(folder: str | Path) -> str | None:
    """Return the prompt template an adapter was trained with; None if its folder does not say."""
    template = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8")).get("template")
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
    """
    config, origin = read_adapter_config(folder)
    tensors = _read_tensors(Path(folder) / WEIGHTS_FILE)
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    injected = not adapted_linears(model)
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
            parameter.copy_(tensors[name])
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterFileError(f"{path.parent}: incomplete ({WEIGHTS_FILE} is missing)")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path}: corrupt, not a readable safetensors file ({error})") from error
