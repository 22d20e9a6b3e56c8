"""Read adapter folders of PEFT's own LoRA, DoRA and HiRA, and refuse options that this package lacks.

PEFT is not imported. What else stands in ``adapter_config.json`` depends on PEFT's version: an option that is
not known here may only have a value that turns it off.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import GateConfig, NoGateConfig, gate_from_dict
from gatera_lightning.adapters.peft_schema import RECORD, module_patterns, target_patterns
from gatera_lightning.errors import ConfigError

_NEUTRAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "layers_to_transform", "layers_pattern"),
    *("exclude_modules", "rank_pattern", "alpha_pattern"),
    *("lora_alpha", "lora_dropout", "use_dora", "use_rslora", "hira_dropout"),
    *("eva_config", "megatron_core", "qalora_group_size", RECORD),
}
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "init_weights": (True, False, None, "gaussian"),
}
"""Options whose usual value is no empty one. Other ways to initialize LoRA change the frozen weights."""

_REASONS = {
    "bias": "this package trains no bias",
    "init_lora_weights": "it changes the frozen weights; convert the adapter with "
    "save_pretrained(path_initial_model_for_weight_conversion=…)",
    "alora_invocation_tokens": "activated LoRA (aLoRA) applies from these tokens on; here, a position gate "
    "takes a mask of the tokens instead",
    "modules_to_save": "load this adapter with PeftModel.from_pretrained",
    "trainable_token_indices": "load this adapter with PeftModel.from_pretrained",
    "fan_in_fan_out": "Conv1D layers have transposed weights, which cannot be adapted",
}
_PARTS = {
    "LORA": {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"},
    "HIRA": {"hira_A": "a", "hira_B": "b"},
}
PEFT_METHODS = tuple(_PARTS)
"""PEFT's own methods that can be read."""


def config_of_peft_method(description: Mapping[str, Any]) -> AdapterConfig:
    """Return the settings of an adapter of PEFT's own LoRA, DoRA or HiRA.

    It has no gate, except a position gate if this package wrote it, which has no parameters.
    Rank-stabilized LoRA scales by ``α/√r``, which is ``alpha = α·√r`` here.

    Args:
        description: The contents of ``adapter_config.json``.

    Raises:
        ConfigError: If an option is used that this package lacks. The error names all of them.
    """
    method = description["peft_type"]
    if problems := [text for key, value in description.items() if (text := _problem(method, key, value))]:
        raise ConfigError(problems)
    rank, alpha, patterns = description.get("r"), None, module_patterns(description)
    if method == "LORA":
        if description.get("use_rslora") and (patterns["rank_pattern"] or patterns["alpha_pattern"]):
            raise ConfigError(
                "use_rslora: True with rank_pattern or alpha_pattern cannot be loaded: α/√r of each layer is "
                "no α/r with one alpha"
            )
        alpha = description.get("lora_alpha")
        if description.get("use_rslora") and isinstance(alpha, int | float) and isinstance(rank, int):
            alpha = alpha * math.sqrt(rank)
        alpha = None if alpha == rank and not patterns["rank_pattern"] else alpha
    targets, layers = target_patterns(description)
    return AdapterConfig(
        update="hira" if method == "HIRA" else "dora" if description.get("use_dora") else "lora",
        gate=_gate(description),
        rank=rank,  # type: ignore[arg-type]  # AdapterConfig.problems() checks the types
        alpha=alpha,
        dropout=description.get(f"{method.lower()}_dropout", 0.0),
        target_modules=targets,
        layers=layers,
        **patterns,
    )


def _gate(description: Mapping[str, Any]) -> GateConfig:
    record = description.get(RECORD)
    if not record:
        return NoGateConfig()
    gate = gate_from_dict(record["gate"]) if isinstance(record, Mapping) and "gate" in record else None
    if gate is None or not gate.needs_mask:
        raise ConfigError(
            f"{RECORD}: {record!r}; accepted in a folder of PEFT's own methods: a position gate"
        )
    return gate


def tensor_name_of_peft_method(method: str) -> Callable[[str], str]:
    """Return the function from a tensor's name in PEFT's file to that of the parameter in our model."""
    parts = _PARTS[method]

    def parameter_name(name: str) -> str:
        name = name.removeprefix("base_model.model.")
        for theirs, ours in parts.items():
            if name.endswith(f".{theirs}"):
                return f"{name.removesuffix(theirs)}update.{ours}"
        return name

    return parameter_name


def to_tensor_name_of_peft_method(method: str, name: str) -> str:
    """Return the name in PEFT's file of a parameter of an ungated adapter."""
    theirs = {ours: theirs for theirs, ours in _PARTS[method].items()}
    layer, _, parameter = name.rpartition("update.")
    return f"base_model.model.{layer}{theirs[parameter]}"


def _problem(method: str, key: str, value: Any) -> str | None:
    if key in _NEUTRAL or value in _OFF.get(key, (None, False, {}, [], "")):
        return None
    if not re.fullmatch(r"\w+", key):
        key = repr(key)
    reason = _REASONS.get(key, "this package has no such option")
    return f"{key}: {value!r} of a {method} adapter of PEFT cannot be loaded: {reason}"
