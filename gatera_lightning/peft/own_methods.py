"""Write an ungated adapter as PEFT's own LoRA, DoRA or HiRA, which need nothing of this package."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save
from torch import Tensor

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.identity import is_gate_parameter
from gatera_lightning.adapters.kernels.khatri_rao import khatri_rao_factors
from gatera_lightning.adapters.peft_methods import to_tensor_name_of_peft_method
from gatera_lightning.adapters.peft_schema import RECORD, to_peft, to_text
from gatera_lightning.adapters.serialization import WEIGHTS_FILE, check_folder
from gatera_lightning.adapters.stored_config import CONFIG_FILE
from gatera_lightning.checkpointing.atomic_files import atomic_file


def peft_method_problem(config: AdapterConfig, *, lora_only: bool) -> str | None:
    """Describe why an adapter is none of PEFT's own methods; None if it is one.

    Args:
        config: The adapter's settings.
        lora_only: Whether only plain LoRA will do, which is what inference engines read.
    """
    if config.gate.mask_embeddings:
        return (
            f"it has {config.gate.mask_embeddings} mask embeddings and a sampler head, and PEFT's own "
            "methods have none; accepted: an adapter with adapter.gate.mask_embeddings 0, or --format gatera"
        )
    if config.update == "hira" and config.rank_pattern:
        return f"rank_pattern: {config.rank_pattern!r}, which PEFT's own HiRA does not apply"
    if config.gate.kind == "static" and config.update in ("lora", "hira", "abba"):
        return _lora_problem(config) if lora_only else None
    if config.gate.kind not in ("none", "position"):
        return (
            f"it has a {config.gate.kind!r} gate, and PEFT's own methods have none; accepted: gate none or "
            "position, or static with update lora, hira or abba, whose value becomes a factor of B"
        )
    if config.update == "hira" and not hasattr(peft, "HiraConfig"):
        return f"PEFT {peft.__version__} has no HiRA; accepted: peft 0.21 or newer"
    if config.update not in ("lora", "dora", "hira", "abba"):
        return f"PEFT has no method for update {config.update!r}; accepted: lora, dora, hira, abba"
    return _lora_problem(config) if lora_only else None


def _lora_problem(config: AdapterConfig) -> str | None:
    if config.update in ("lora", "abba"):
        return None
    rank = (
        "its rank is that of the frozen weight"
        if config.update == "hira"
        else "it rescales the frozen weight"
    )
    return (
        f"update {config.update!r} is no LoRA: {rank}; accepted: update lora or abba, or --format peft or "
        "merged"
    )


def write_peft_method(
    folder: Path, tensors: Mapping[str, Tensor], config: AdapterConfig, origin: Mapping[str, Any]
) -> Path:
    """Write an adapter as a folder of PEFT's LoRA, DoRA or HiRA.

    ABBA becomes a LoRA of rank (r/2)². A static gate becomes a factor of B. A position gate has no
    parameters: its kind is stored under a key that PEFT ignores with a warning, and PEFT applies the update
    to every token.

    Args:
        folder: The folder to write.
        tensors: The adapter's tensors by parameter name.
        config: Its settings, without a :func:`peft_method_problem`.
        origin: The ``id`` and ``revision`` of the backbone.

    Returns:
        The folder.

    Raises:
        AdapterFileError: If a value is NaN or infinite, or the folder is a file or holds a model; nothing is
            written.
    """
    layers = sorted({name.rpartition("update.")[0].rstrip(".") for name in tensors if "update." in name})
    if config.update == "abba":
        config, tensors = abba_as_lora(config, tensors, layers)
    method = "HIRA" if config.update == "hira" else "LORA"
    ours = to_peft(config, layers, origin=origin, task_type="CAUSAL_LM")
    names = ("target_modules", "layers_to_transform", "task_type", "revision", "inference_mode", "r")
    modules = ("exclude_modules", "rank_pattern")
    settings = {name: ours[name] for name in (*names, *modules, "base_model_name_or_path")}
    if method == "HIRA":
        theirs: peft.PeftConfig = peft.HiraConfig(hira_dropout=config.dropout, **settings)
    else:
        alpha = config.rank * config.scale
        theirs = peft.LoraConfig(
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # any number works
            alpha_pattern=_alpha_pattern(config, layers, alpha),
            lora_dropout=config.dropout,
            use_dora=config.update == "dora",
            **settings,
        )
    description = theirs.to_dict()
    description = {
        key: sorted(value) if isinstance(value, set) else value for key, value in description.items()
    }
    if config.gate.needs_mask:
        description[RECORD] = {"gate": config.gate.to_dict()}
    stored = {
        to_tensor_name_of_peft_method(method, name): _with_gate(name, tensor, tensors).contiguous()
        for name, tensor in tensors.items()
        if not is_gate_parameter(name)
    }
    check_folder(folder, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / CONFIG_FILE) as config_file, atomic_file(folder / WEIGHTS_FILE) as weights_file:
        weights_file.write_bytes(save(stored, metadata={"format": "pt"}))
        config_file.write_text(to_text(json.loads(json.dumps(description))), encoding="utf-8")
    return folder


def abba_as_lora(
    config: AdapterConfig, tensors: Mapping[str, Tensor], layers: list[str]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return the LoRA of rank (r/2)² that an ABBA adapter of rank r is, by its Khatri–Rao form.

    The product of its factors is exact; LoRA's alpha grows with the rank, so that the scale is the same.

    Args:
        config: The settings of the ABBA adapter.
        tensors: Its tensors by parameter name; those of its gates are kept.
        layers: Names of the adapted layers.
    """
    alphas = {
        f"^{re.escape(name)}": _product_rank(config.rank_of(name)) * config.scale_of(name) for name in layers
    }
    lora = replace(
        config,
        update="lora",
        rank=_product_rank(config.rank),
        alpha=None if config.alpha is None else config.scale * _product_rank(config.rank),
        rank_pattern={key: _product_rank(rank) for key, rank in config.rank_pattern.items()},
        alpha_pattern=alphas if config.has_patterns else {},
    )
    found = {name: tensor for name, tensor in tensors.items() if is_gate_parameter(name)}
    for layer in layers:
        update = f"{layer}.update." if layer else "update."
        factors = (tensors[f"{update}{name}"] for name in ("weight_a", "weight_b", "a", "b"))
        found[f"{update}a"], found[f"{update}b"] = khatri_rao_factors(*factors)
    return lora, found


def _product_rank(rank: int) -> int:
    return (rank // 2) ** 2


def _alpha_pattern(config: AdapterConfig, layers: list[str], alpha: float) -> dict[str, float]:
    """Return the alpha of each layer where it is not ``alpha``, as where alpha follows the layer's rank."""
    if not config.has_patterns:
        return {}
    alphas = {name: config.rank_of(name) * config.scale_of(name) for name in layers}
    return {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha}


def _with_gate(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return B times the layer's static gate, if there is one; other tensors as they are."""
    logit = tensors.get(name.removesuffix("update.b") + "gate.bias")
    return tensor if logit is None or not name.endswith("update.b") else tensor * torch.sigmoid(logit)
