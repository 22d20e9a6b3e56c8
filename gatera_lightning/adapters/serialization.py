"""Write and read adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, no pickle.

A folder is one of Hugging Face PEFT as well, which loads it once ``gatera_lightning.peft`` is imported.
"""

import hashlib
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
    backbone_fingerprints,
    full_cpu_tensor,
    non_finite_problem,
)
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters, own_name, unwrapped
from gatera_lightning.adapters.model_card import CARD_FILE, is_kept, model_card
from gatera_lightning.adapters.peft_schema import (
    RECORD,
    settings_digest,
    to_peft,
    to_peft_tensor,
    to_text,
)
from gatera_lightning.adapters.stored_config import (
    CONFIG_FILE,
    FORMAT_VERSION,
    StoredAdapter,
    read_stored_config,
)
from gatera_lightning.checkpointing.atomic_files import atomic_file
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.errors import AdapterFileError, checks_arguments

log = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
_RECORDED_ORIGIN = ("fingerprint", "fingerprint_float16", "attn_implementation")


@checks_arguments
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    template: str | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
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
        details: Tables for the model card by their title, such as data, settings and metrics of the run.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no adapter, or PEFT trains more than one set of settings describes.
        AdapterFileError: If a value is NaN or infinite, or the folder is a file or holds a model; nothing is
            written.
    """
    model = unwrapped(model)
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapted layers")
    if problem := _what_only_peft_saves(model):
        raise ValueError(f"save_adapter: {problem}; call model.save_pretrained, which saves all of it")
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
        **backbone_fingerprints(model),
        "attn_implementation": getattr(hf_config, "_attn_implementation", None),
    }
    config = next(iter(layers.values())).config
    dtype = reduce(
        torch.promote_types, (t.dtype for t in tensors.values()), getattr(torch, config.adapter_dtype)
    )
    settings: dict[str, Any] = {"adapter_dtype": str(dtype).removeprefix("torch.")}
    config = replace(config, **settings)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    task_type = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
    return write_adapter(folder, tensors, config, origin, template, task_type, details)


def _what_only_peft_saves(model: nn.Module) -> str | None:
    """Describe what a model of PEFT trains besides one set of settings for all layers; None if nothing."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "AuxiliaryTrainingWrapper" for kind in type(module).__mro__):
            return f"{name} is trained beside the adapter (modules_to_save, trainable_token_indices)"
    configs = [layer.config for layer in adapted_linears(model).values()]
    if any(config != configs[0] for config in configs):
        return "the layers have different settings (rank_pattern, alpha_pattern)"
    return None


def write_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    config: AdapterConfig,
    origin: dict[str, Any],
    template: str | None,
    task_type: str | None = "CAUSAL_LM",
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write an adapter folder in PEFT's schema; each file is replaced atomically.

    A model card, ``README.md``, is written too, unless somebody wrote one.

    Args:
        folder: The folder to write.
        tensors: Unsharded CPU tensors, by parameter name.
        config: The adapter's settings.
        origin: The ``id``, ``revision`` and ``fingerprint`` of the backbone.
        template: The prompt template of the training data, if known.
        task_type: PEFT's name of the task; None if the model is no language model.
        details: Tables for the model card by their title.

    Returns:
        The folder.

    Raises:
        AdapterFileError: If a value is NaN or infinite, or the folder is a file or holds a model; nothing is
            written.
    """
    check_folder(folder, tensors)
    weights = save({to_peft_tensor(name): t for name, t in tensors.items()}, metadata={"format": "pt"})
    layers = sorted({name.rpartition(".update.")[0] for name in tensors if ".update." in name})
    description = to_peft(config, layers, origin=origin, task_type=task_type)
    description[RECORD] = {
        "format_version": FORMAT_VERSION,
        **{name: origin.get(name) for name in _RECORDED_ORIGIN},
        **{name: origin[name] for name in ("quantization", "adapter_sha256") if origin.get(name)},
        "settings_sha256": settings_digest(description),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if template in get_args(Template):
        description[RECORD]["template"] = template
    elif template is not None:
        log.warning(
            "%s: the prompt template %r is not stored, because chat and generate know only %s",
            *(folder, template, ", ".join(get_args(Template))),
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / CONFIG_FILE) as config_file, atomic_file(folder / WEIGHTS_FILE) as weights_file:
        weights_file.write_bytes(weights)
        config_file.write_text(to_text(description), encoding="utf-8")
    if not is_kept(folder / CARD_FILE):
        with atomic_file(folder / CARD_FILE) as card:
            card.write_text(model_card(folder.name, config, origin, template, details), encoding="utf-8")
    return folder


def check_folder(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if a folder or the values of an adapter must not be written."""
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(
            f"{folder}: the adapter is not saved, because this is a file; accepted: a folder"
        )
    if problem := non_finite_problem(tensors):
        raise AdapterFileError(f"{folder}: the adapter is not saved, because {problem}")
    if (folder / "config.json").exists():
        raise AdapterFileError(
            f"{folder}: the adapter is not saved, because this folder holds a model (config.json), which an "
            f"{CONFIG_FILE} beside it would break; accepted: a folder of its own"
        )


def read_adapter_config(folder: str | Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Read ``adapter_config.json``.

    Args:
        folder: An adapter folder.

    Returns:
        The adapter's settings, and the ``id``, ``revision`` and ``fingerprint`` of its backbone.

    Raises:
        AdapterFileError: If the file is missing, malformed or from a newer version.
    """
    stored = read_stored_config(folder)
    return stored.config, stored.origin


def read_adapter(folder: str | Path) -> tuple[StoredAdapter, dict[str, Tensor]]:
    """Read an adapter folder without a model.

    Returns:
        What its ``adapter_config.json`` says, and its tensors by the name of their parameter.

    Raises:
        AdapterFileError: If a file is missing, malformed or corrupt.
    """
    stored = read_stored_config(folder)
    return stored, _read_tensors(Path(folder) / WEIGHTS_FILE, stored)


def trained_template(folder: str | Path) -> str | None:
    """Return the prompt template an adapter was trained with; None if its folder does not say."""
    return read_stored_config(folder).template


def _read_tensors(path: Path, stored: StoredAdapter) -> dict[str, Tensor]:
    """Read the weights file: tensors by the name of their parameter."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        if pickled.is_file():
            raise AdapterFileError(
                f"{pickled}: a pickle, which can run code when it is read; accepted: {WEIGHTS_FILE}. Whoever "
                "trusts it can convert it with PeftModel.from_pretrained and save_pretrained"
            )
        raise AdapterFileError(f"{path.parent}: incomplete ({WEIGHTS_FILE} is missing)")
    try:
        weights = path.read_bytes()
        tensors = load(weights)
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path}: corrupt, not a readable safetensors file ({error})") from error
    if stored.weights_sha256 not in (None, hashlib.sha256(weights).hexdigest()):
        raise AdapterFileError(
            f"{path}: corrupt, or changed after it was saved: its SHA-256 is not the one in {CONFIG_FILE}"
        )
    if stored.is_peft_method:  # PEFT saves 16-bit factors if it trained them so
        tensors = {n: t.float() if t.dtype.itemsize == 2 else t for n, t in tensors.items()}
    return {stored.parameter_name(name): tensor for name, tensor in tensors.items()}
