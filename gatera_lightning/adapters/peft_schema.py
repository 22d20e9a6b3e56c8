"""Adapter folders in the schema of Hugging Face PEFT: names of settings and of tensors.

PEFT names a method by ``peft_type`` and keeps all its settings in one table. This module translates that
table for the method GATERA, which holds every update with every gate, without importing PEFT.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import gate_from_dict
from gatera_lightning.adapters.name_patterns import SUFFIX, ended_name, first_match, layer_index, name_ending
from gatera_lightning.adapters.target_problems import ALL_LINEAR
from gatera_lightning.errors import ConfigError, near_miss

PEFT_TYPE = "GATERA"
RECORD = "gatera"
"""Key of what PEFT has no name for: format, fingerprints, template and digests."""

_RENAMED = {"rank": "r", "layers": "layers_to_transform"}
_SETTINGS = tuple(_RENAMED.get(field.name, field.name) for field in fields(AdapterConfig))
_UNUSED: dict[str, Any] = {
    "exclude_modules": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
}
"""Settings of PEFT for which a setting of ours may be missing, with the value that means: not used."""

_PEFT_KEYS: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "peft_version": (str, type(None)),
    "task_type": (str, type(None)),
    "auto_mapping": (dict, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "inference_mode": (bool,),
    RECORD: (dict,),
}
_REQUIRED = ("update", "gate", "r", "target_modules")
_TYPE_NAMES = {type(None): "null", str: "a text", dict: "a table", bool: "true or false"}
_MODEL_PREFIX = "base_model.model."
_PARTS = ("update", "gate")


def to_peft(
    config: AdapterConfig, layers: list[str], *, origin: Mapping[str, Any], task_type: str | None
) -> dict[str, Any]:
    """Return an adapter's settings in PEFT's schema, without the record of this package.

    Args:
        config: The settings.
        layers: Names of the adapted layers, which are listed where PEFT has no equal way to choose them.
        origin: The ``id`` and ``revision`` of the backbone.
        task_type: PEFT's name of the task, ``CAUSAL_LM`` for a language model.
    """
    values = {_RENAMED.get(name, name): value for name, value in config.to_dict().items()}
    patterns = config.target_modules
    targets = _to_peft_names(patterns) if isinstance(patterns, list) else None
    if targets is not None and (config.layers is None or isinstance(targets, list)):
        values["target_modules"] = targets
        if config.layers is not None:
            values["layers_to_transform"] = _indices(config.layers, layers)
    else:
        values |= {"target_modules": sorted(layers), "layers_to_transform": None}
    values["exclude_modules"] = _to_peft_names(config.exclude_modules) or None
    for setting in ("rank_pattern", "alpha_pattern"):
        values[setting] = _in_any_order(values[setting], layers)
    return (
        _UNUSED
        | values
        | {
            "peft_type": PEFT_TYPE,
            "peft_version": _peft_version(),
            "task_type": task_type,
            "auto_mapping": None,
            "base_model_name_or_path": origin["id"],
            "revision": origin["revision"],
            "inference_mode": True,
        }
    )


def from_peft(description: Mapping[str, Any]) -> AdapterConfig:
    """Return an adapter's settings from PEFT's schema.

    Raises:
        ConfigError: If a key is unknown, has another type, or needs PEFT to be loaded.
    """
    known = {*_SETTINGS, *_UNUSED, *_PEFT_KEYS}
    if unknown := [key for key in description if key not in known]:
        raise ConfigError(
            f"unknown keys {', '.join(unknown)}; accepted: {', '.join(sorted(known))}"
            f"{near_miss(unknown[0], known)}"
        )
    if missing := [key for key in _REQUIRED if key not in description]:
        raise ConfigError(f"malformed: {', '.join(missing)} is missing")
    for key, types in _PEFT_KEYS.items():
        if key in description and type(description[key]) not in types:
            accepted = " or ".join(_TYPE_NAMES[kind] for kind in types)
            raise ConfigError(f"{key}: {description[key]!r}; accepted: {accepted}")
    for key, unused in _UNUSED.items():
        value = description.get(key, unused)
        if value and key not in (*_SETTINGS, "layers_pattern"):
            raise ConfigError(
                f"{key}: {value!r} needs PEFT; load this adapter with PeftModel.from_pretrained"
            )
    values = {name: description[key] for name, key in _names() if key in description}
    values["target_modules"], values["layers"] = target_patterns(description)
    values |= module_patterns(description)
    if isinstance(values.get("gate"), Mapping):
        values["gate"] = gate_from_dict(values["gate"])
    return AdapterConfig(**values)


def target_patterns(description: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return ``target_modules`` and ``layers`` of our settings for those of PEFT, without checking them."""
    targets, pattern = description.get("target_modules"), description.get("layers_pattern")
    layers = description.get("layers_to_transform")
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    found = _from_peft_targets(targets, pattern, layers)
    return found, None if pattern else layers


def module_patterns(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``exclude_modules`` and the pattern tables of our settings for those of PEFT, unchecked."""
    tables = {name: description.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    excluded = description.get("exclude_modules") or []
    return tables | {"exclude_modules": _from_peft_targets(excluded, None, None)}


def settings_digest(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings of the method, which the weights belong to."""
    keys = {*_SETTINGS, *_UNUSED}
    settings = {key: description[key] for key in keys if description.get(key) not in (None, {}, [])}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def to_text(description: Mapping[str, Any]) -> str:
    """Return ``adapter_config.json`` as PEFT writes it."""
    return json.dumps(description, indent=2, sort_keys=True)


def to_peft_tensor(name: str) -> str:
    """Return a parameter's name in PEFT's file: ``q_proj.update.a`` -> ``…q_proj.gatera_update.a``."""
    at, part = max((f".{name}".rfind(f".{part}."), part) for part in _PARTS)
    if at < 0:  # of no layer
        return f"{_MODEL_PREFIX}{name}"
    layer, parameter = name[: max(0, at - 1)], name[at + len(part) + 1 :]
    return f"{_MODEL_PREFIX}{layer}{'.' if layer else ''}gatera_{part}.{parameter}"


def from_peft_tensor(name: str) -> str:
    """Return the name of a parameter in the adapted model from its name in PEFT's file."""
    name = name.removeprefix(_MODEL_PREFIX)
    for part in _PARTS:
        head, found, parameter = name.rpartition(f"gatera_{part}.")
        if found:
            return f"{head}{part}.{parameter}"
    return name


def _names() -> list[tuple[str, str]]:
    return [(field.name, _RENAMED.get(field.name, field.name)) for field in fields(AdapterConfig)]


def _to_peft_names(patterns: list[str]) -> list[str] | str:
    """Return names as a list, and expressions as one text, as PEFT reads them."""
    names = [ended_name(pattern) for pattern in patterns]
    return _one_expression(patterns) if None in names else [name for name in names if name is not None]


def _indices(layers: list[int], names: list[str]) -> list[int]:
    """Return indices of layers without negative ones, for which those of the adapted layers stand."""
    if min(layers) >= 0:
        return layers
    return sorted({index for name in names if (index := layer_index(name)) is not None})


def _in_any_order(patterns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a pattern table that gives the same values after sorting, which JSON files of PEFT undergo."""
    keys = {name: first_match(patterns, name) for name in names}
    if keys == {name: first_match(sorted(patterns), name) for name in names}:
        return patterns
    return {f"^{re.escape(name)}": patterns[key] for name, key in keys.items() if key is not None}


def _one_expression(patterns: list[str]) -> str:
    """Return one regular expression for whole names, as PEFT reads a text."""
    if len(patterns) == 1:
        return patterns[0]
    return "|".join(
        f"(?:{SUFFIX}{pattern})" if re.fullmatch(r"\w+", pattern) else f"(?:{pattern})"
        for pattern in patterns
    )


def _from_peft_targets(targets: Any, layers_pattern: Any, layers: Any) -> Any:
    if isinstance(targets, str):
        return ALL_LINEAR if targets == ALL_LINEAR else [targets]
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        return targets  # AdapterConfig.problems() reports it
    names = [name_ending(name) for name in targets]
    if not layers_pattern:
        return names
    lists = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    if not (isinstance(layers, list) and all(isinstance(name, str) for name in lists)):
        return targets
    inside = f"{SUFFIX}(?:{'|'.join(lists)})\\.(?:{'|'.join(map(str, layers))})\\."
    return [f"{inside}{name if name.startswith(SUFFIX) else SUFFIX + name}" for name in names]


def _peft_version() -> str | None:
    try:
        return metadata.version("peft")
    except metadata.PackageNotFoundError:
        return None
