"""Gates, which decide how much of the update a layer applies to a token, and their settings.

To add a gate, write a :class:`Gate` and a :class:`GateConfig` that builds it, in a file of its own, and pass
the latter to :func:`register_gate`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from gatera_lightning.adapters.gates.base import (
    Gate,
    GateConfig,
    GateValues,
    is_finite_number,
    threshold_problems,
)
from gatera_lightning.adapters.gates.hard import HardGateConfig
from gatera_lightning.adapters.gates.position import PositionGateConfig
from gatera_lightning.adapters.gates.static import StaticGate, StaticGateConfig
from gatera_lightning.adapters.gates.threshold import ThresholdGateConfig
from gatera_lightning.adapters.gates.token import TokenGate, TokenGateConfig
from gatera_lightning.adapters.gates.ungated import NoGateConfig
from gatera_lightning.errors import ConfigError

__all__ = [
    "GATES",
    "Gate",
    "GateConfig",
    "GateValues",
    "HardGateConfig",
    "NoGateConfig",
    "PositionGateConfig",
    "StaticGate",
    "StaticGateConfig",
    "ThresholdGateConfig",
    "TokenGate",
    "TokenGateConfig",
    "describe_gates",
    "gate_from_dict",
    "is_finite_number",
    "register_gate",
    "threshold_problems",
]

ConfigClass = TypeVar("ConfigClass", bound=type[GateConfig])

GATES: dict[str, type[GateConfig]] = {
    config.kind: config
    for config in (
        NoGateConfig,
        StaticGateConfig,
        TokenGateConfig,
        HardGateConfig,
        ThresholdGateConfig,
        PositionGateConfig,
    )
}
"""The available kinds of gates, by name."""


def register_gate(config: ConfigClass) -> ConfigClass:
    """Make a kind of gate available under its ``kind``; usable as a class decorator.

    Raises:
        TypeError: If it is not a subclass of GateConfig.
        ValueError: If another class has this name.
    """
    if not (isinstance(config, type) and issubclass(config, GateConfig)):
        raise TypeError(f"register_gate: {config!r:.60}; accepted: a subclass of GateConfig")
    if GATES.setdefault(config.kind, config) is not config:
        raise ValueError(f"a gate named {config.kind!r} is already registered: {GATES[config.kind].__name__}")
    return config


def describe_gates() -> str:
    """Return one line that lists every registered gate with its formula, for ``--help``."""
    return "; ".join(f"{kind} = {config.formula}" for kind, config in GATES.items())


def gate_from_dict(values: Mapping[str, Any]) -> GateConfig:
    """Create the settings of a gate from plain values such as ``{"kind": "token", "bias": -2.0}``.

    Raises:
        ConfigError: If the kind or a setting is unknown.
    """
    settings = dict(values)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in GATES:
        raise ConfigError(f"adapter.gate.kind: {kind!r} is unknown; accepted: {', '.join(GATES)}")
    accepted = [field.name for field in fields(GATES[kind])]
    if unknown := sorted(set(settings) - set(accepted)):
        raise ConfigError(
            f"adapter.gate: a {kind!r} gate has no {', '.join(unknown)}; accepted: {', '.join(accepted)}"
        )
    return GATES[kind](**settings)
