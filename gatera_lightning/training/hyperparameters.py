"""A module's settings as plain values in checkpoints, and back; checkpoints of version 0.1 included.

Checkpoints of version 0.1 hold pickled settings classes under the names of modules that have moved, or, if
the run was started from the command line, plain values in the locations of that version.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import GATES, GateConfig
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.errors import ConfigError
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.training.optimizer import OptimizerConfig

log = logging.getLogger(__name__)

# Allows old checkpoints to be read without unpickling anything else.
torch.serialization.add_safe_globals(
    [
        (AdapterConfig, "gatera_lightning.adapters.config.AdapterConfig"),
        (BackboneConfig, "gatera_lightning.backbone.BackboneConfig"),
        (DecodingConfig, "gatera_lightning.generation.DecodingConfig"),
        (OptimizerConfig, "gatera_lightning.optimization.OptimizerConfig"),
    ]
)

_CONFIGS: dict[str, Any] = {
    "backbone": BackboneConfig,
    "adapter": AdapterConfig,
    "optimizer": OptimizerConfig,
    "decoding": DecodingConfig,
}


def to_plain(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's hyperparameters with every settings class as a dictionary of plain values."""
    return {name: _plain(value) for name, value in hyperparameters.items()}


def from_plain(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``GateRAModule`` for the hyperparameters of a checkpoint.

    Args:
        hyperparameters: What :func:`to_plain` returned, what the command line saved, or either of version
            0.1.

    Returns:
        The settings classes, the other values unchanged, without Lightning's own entries. A file never
        turns on ``trust_remote_code``.

    Raises:
        ConfigError: If a setting is unknown.
    """
    found = {name: value for name, value in hyperparameters.items() if not name.startswith("_")}
    moved = {"entropy_weight": found.pop("gate_entropy_weight", None)}
    for name, config in _CONFIGS.items():
        if isinstance(found.get(name), Mapping):
            values = dict(found[name])
            if config is OptimizerConfig:
                moved["lr_multiplier"] = values.pop("gate_lr_multiplier", None)
            found[name] = _adapter(values) if config is AdapterConfig else config(**values)
    if "adapter" in found:
        found["adapter"] = _with_gate_settings(found["adapter"], **moved)
    if getattr(found.get("backbone"), "trust_remote_code", False):
        log.warning(
            "the checkpoint has model.backbone.trust_remote_code true, which is ignored: only your own code "
            "can turn it on, with backbone=BackboneConfig(..., trust_remote_code=True)"
        )
        found["backbone"] = replace(found["backbone"], trust_remote_code=False)
    return found


def read_hyperparameters(
    checkpoint: Any, hparams_file: Any = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read the arguments of ``GateRAModule`` from a checkpoint.

    Args:
        checkpoint: A path or an open binary file, which is rewound.
        hparams_file: A YAML file that replaces the hyperparameters in the checkpoint.
        weights_only: As for ``torch.load``.

    Returns:
        What :func:`from_plain` returns, and the entries that turn off Lightning's own way to create the
        module.
    """
    if hparams_file is not None:
        hyperparameters = load_hparams_from_yaml(hparams_file)
    else:
        content = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
        hyperparameters = content.get("hyper_parameters", {})
        if hasattr(checkpoint, "seek"):
            checkpoint.seek(0)
    return from_plain(hyperparameters) | {"_instantiator": None, "gate_entropy_weight": None}


def move_deprecated(
    adapter: AdapterConfig, optimizer: OptimizerConfig, deprecated: dict[str, Any]
) -> tuple[AdapterConfig, OptimizerConfig]:
    """Move gate settings out of their locations in version 0.1.

    Args:
        adapter: The adapter's settings.
        optimizer: The optimizer's settings, possibly with ``gate_lr_multiplier``.
        deprecated: Further arguments of ``GateRAModule``; emptied.

    Returns:
        The adapter's settings with the values in its gate's, and the optimizer's settings without them.

    Raises:
        TypeError: If an argument is unknown.
    """
    entropy_weight = deprecated.pop("gate_entropy_weight", None)
    deprecated.pop("_instantiator", None)
    if deprecated:
        raise TypeError(f"GateRAModule has no argument {', '.join(deprecated)}")
    if entropy_weight is not None:
        warnings.warn(
            "GateRAModule(gate_entropy_weight) is deprecated; use adapter.gate.entropy_weight",
            DeprecationWarning,
            stacklevel=3,
        )
    lr_multiplier = optimizer.gate_lr_multiplier
    adapter = _with_gate_settings(adapter, entropy_weight=entropy_weight, lr_multiplier=lr_multiplier)
    return adapter, optimizer if lr_multiplier is None else replace(optimizer)


def _with_gate_settings(adapter: AdapterConfig, **given: float | None) -> AdapterConfig:
    """Put the values that are not None into the gate's settings; a gate without such a setting ignores it."""
    if not isinstance(adapter.gate, GateConfig):  # an unknown name, which problems() reports
        return adapter
    known = {field.name for field in fields(adapter.gate)}
    moved: dict[str, Any] = {
        name: value for name, value in given.items() if value is not None and name in known
    }
    return replace(adapter, gate=replace(adapter.gate, **moved)) if moved else adapter


def _plain(value: Any) -> Any:
    if isinstance(value, AdapterConfig) and isinstance(value.gate, GateConfig):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _adapter(values: dict[str, Any]) -> AdapterConfig:
    gate = values.get("gate")
    if isinstance(gate, Mapping) and "class_path" in gate:  # the spelling of jsonargparse
        name = str(gate["class_path"]).rpartition(".")[2]
        kinds = {config.__name__: kind for kind, config in GATES.items()}
        if name not in kinds:
            raise ConfigError(
                f"adapter.gate.class_path: {name!r} is not registered; accepted: {', '.join(kinds)}"
            )
        values = values | {"gate": {"kind": kinds[name], **gate.get("init_args", {})}}
    return AdapterConfig.from_dict(values)
