"""Settings of an adapter: which layers to adapt, with which update ``u`` and which gate ``g``."""

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast, get_args

from gatera_lightning.adapters.gates import (
    GATES,
    GateConfig,
    TokenGateConfig,
    gate_from_dict,
    is_finite_number,
)
from gatera_lightning.adapters.name_patterns import first_match
from gatera_lightning.adapters.target_problems import is_int, module_problems, pattern_problems
from gatera_lightning.adapters.updates import UPDATES
from gatera_lightning.adapters.updates.base import Update
from gatera_lightning.errors import ConfigError, unknown_value

AdapterDtype = Literal["float32", "float64"]

FLAT_GATE_SETTINGS = {
    "gate_bias": "bias",
    "gate_entropy_weight": "entropy_weight",
    "gate_lr_multiplier": "lr_multiplier",
    "skip_below": "skip_below",
    "merge_above": "merge_above",
    "gate_gradient_share": "gradient_share",
    "gate_reads": "reads",
    "gate_sparsity_weight": "sparsity_weight",
    "gate_threshold": "threshold",
}
"""Flat name of a gate's setting, as in result files and in version 0.1 -> its name in the gate's config."""

_DEPRECATED_ARGUMENTS = ("gate_bias", "skip_below", "merge_above")


def _accept_deprecated_arguments(config: type["AdapterConfig"]) -> type["AdapterConfig"]:
    """Let the constructor accept the old flat gate settings without listing them in its signature."""
    init = cast(Callable[..., None], config.__init__)

    @functools.wraps(init)  # inspect.signature, and therefore --help, shows the wrapped signature
    def __init__(self: "AdapterConfig", *args: Any, **settings: Any) -> None:
        flat = {name: settings.pop(name) for name in _DEPRECATED_ARGUMENTS if name in settings}
        init(self, *args, **settings)
        if flat:
            old, new = (
                ", ".join(f"{name}=…" for name in names)
                for names in (flat, map(FLAT_GATE_SETTINGS.get, flat))
            )
            warnings.warn(
                f"AdapterConfig({old}) is deprecated; use gate={type(self.gate).__name__}({new})",
                DeprecationWarning,
                stacklevel=2,
            )
            self.gate = _with_flat_settings(self.gate, flat)

    config.__init__ = __init__  # type: ignore[method-assign]
    return config


@_accept_deprecated_arguments
@dataclass
class AdapterConfig:
    """Settings of an adapter; an adapted layer computes ``y = W0 x + b + g(x) · u(x)``.

    The defaults are GateRA's (Ou et al., AAAI 2026, arXiv 2511.17582).
    """

    update: str = "hira"
    """Name of the update u(x)."""

    gate: GateConfig = field(default_factory=TokenGateConfig)
    """The gate g(x) and its settings; in Python, the name of a kind is enough."""

    rank: int = 32
    """Rank r of B A; at most the smaller side of every adapted weight."""

    alpha: float | None = None
    """Scales the update by alpha/rank; null means alpha = rank. An error with hira, which has no scale."""

    blocks: int | None = None
    """With block_hira, the number of blocks along each side of a weight; null means 2."""

    stochastic_rounding: bool = False
    """With hira in bfloat16: let training multiply by W0 + W0 ⊙ BA, rounded at random so that it is right on
    average. Tokens with open gates, or all without a gate or with a static one, then take 3 large matmuls, as
    in float32, instead of 5. It needs dropout 0 and no gate, a static gate, a hard gate or one with
    thresholds. false is exact. Other dtypes need no such rounding."""

    dropout: float = 0.0
    """Dropout probability on the update's input; the frozen layer and the gate see it undropped."""

    target_modules: list[str] | Literal["all-linear"] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    )
    """Linear layers to adapt: the last segment of a module's name, or a regular expression for all of it; or
    ``all-linear`` for all but the output head."""

    exclude_modules: list[str] = field(default_factory=list)
    """Linear layers to leave out, in the syntax of ``target_modules``."""

    layers: list[int] | None = None
    """Indices of the decoder layers to adapt, -1 for the last one; null adapts all of them."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from ``rank``, by the end of a module's name or a regular expression for it; the
    first that matches counts."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Values that differ from ``alpha``, by the end of a module's name or a regular expression for it; the
    first that matches counts."""

    adapter_dtype: AdapterDtype = "float32"
    """Dtype of the trainable parameters; the backbone has its own."""

    def __post_init__(self) -> None:
        if isinstance(self.gate, str) and self.gate in GATES:  # problems() reports an unknown name
            self.gate = GATES[self.gate]()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied config; checkpoints of version 0.1 hold one with flat gate settings."""
        values = dict(state)
        if isinstance(values.get("gate"), str):
            values = vars(type(self).from_dict(values))
        self.__dict__.update(values)

    def problems(self) -> list[str]:
        """Return one message for every value that cannot work with any model; empty if all are valid."""
        found = []
        if self._update is None:
            found.append(unknown_value("adapter.update", self.update, UPDATES))
        if self.adapter_dtype not in get_args(AdapterDtype):
            found.append(unknown_value("adapter.adapter_dtype", self.adapter_dtype, get_args(AdapterDtype)))
        if not is_int(self.rank) or self.rank < 1:
            found.append(f"adapter.rank: {self.rank!r} is not a rank; accepted: an integer of at least 1")
        found += self._alpha_problems() or self._extra_problems()
        if not (is_finite_number(self.dropout) and 0 <= self.dropout < 1):
            found.append(
                f"adapter.dropout: {self.dropout!r}; accepted: a probability of at least 0 and below 1"
            )
        if isinstance(self.gate, GateConfig):
            found += self.gate.problems() or self._threshold_problems() + self._rounding_problems()
        else:
            found.append(unknown_value("adapter.gate", self.gate, GATES))
        found += module_problems(self.target_modules, self.exclude_modules, self.layers)
        return found + pattern_problems(self.rank_pattern, self.alpha_pattern)

    def _alpha_problems(self) -> list[str]:
        if self._update is not None and not self._update.has_scale:
            scaled = " or ".join(name for name, update in UPDATES.items() if update.has_scale)
            given: tuple[tuple[str, Any, Any, str], ...] = (
                ("alpha", self.alpha, None, "null"),
                ("alpha_pattern", self.alpha_pattern, {}, "an empty table"),
            )
            return [
                f"adapter.{name}: {value!r}, but update {self.update!r} has no scale; "
                f"accepted: {without}, or update {scaled}"
                for name, value, neutral, without in given
                if value != neutral
            ]
        if self.alpha is None:
            return []
        if is_finite_number(self.alpha) and self.alpha > 0:
            return []
        return [f"adapter.alpha: {self.alpha!r}; accepted: a number above 0, or null for alpha = rank"]

    def _extra_problems(self) -> list[str]:
        """Describe what is wrong with ``blocks``, or with ranks that do not suit the update."""
        if self.blocks is not None and not (is_int(self.blocks) and self.blocks >= 1):
            return [f"adapter.blocks: {self.blocks!r}; accepted: an integer of at least 1, or null"]
        if not isinstance(self.stochastic_rounding, bool):
            return [f"adapter.stochastic_rounding: {self.stochastic_rounding!r}; accepted: true or false"]
        if self._update is None:
            return []
        without = {"blocks": (None, "no blocks"), "stochastic_rounding": (False, "no merged weight to round")}
        for name, (neutral, lack) in without.items():
            value = getattr(self, name)
            if value != neutral and name not in _taken_settings(self._update):
                able = " or ".join(key for key, update in UPDATES.items() if name in _taken_settings(update))
                return [
                    f"adapter.{name}: {value!r}, but update {self.update!r} has {lack}; "
                    f"accepted: {json.dumps(neutral)}, or update {able}"
                ]
        patterns = self.rank_pattern if isinstance(self.rank_pattern, dict) else {}
        ranks = {"rank": self.rank} | {f"rank_pattern.{key}": rank for key, rank in patterns.items()}
        problems = (
            (name, rank, self._update.rank_problem(rank, **self.extra_settings))
            for name, rank in ranks.items()
            if is_int(rank)
        )
        return [f"adapter.{name}: {rank!r}, but {problem}" for name, rank, problem in problems if problem]

    @property
    def extra_settings(self) -> dict[str, Any]:
        """The settings that the update takes and depends on besides rank and scale, by name."""
        defaults = {"blocks": 2}
        names = () if self._update is None else self._update.extra_settings
        given = {name: getattr(self, name) for name in names}
        return {name: defaults[name] if value is None else value for name, value in given.items()}

    @property
    def training_settings(self) -> dict[str, Any]:
        """The settings that the update takes for training steps only, by name."""
        names = () if self._update is None else self._update.training_settings
        return {name: getattr(self, name) for name in names}

    def _rounding_problems(self) -> list[str]:
        """Describe that no training step would round a merged weight."""
        merges = self.gate.kind in ("none", "static") or (self.gate.saturates and not self.gate.needs_mask)
        rounds = self.stochastic_rounding and "stochastic_rounding" in self.training_settings
        if not rounds or (merges and self.dropout == 0):
            return []
        return [
            f"adapter.stochastic_rounding: true, with a {self.gate.kind!r} gate and dropout "
            f"{self.dropout!r}: no token would use a merged weight; accepted: false, or dropout 0 with gate "
            "none or static, a hard gate, or a gate with skip_below and merge_above"
        ]

    def _threshold_problems(self) -> list[str]:
        used = self._update is not None and self._update.uses_gate_thresholds and self.dropout == 0
        if used or not self.gate.has_thresholds:
            return []
        able = [name for name, update in UPDATES.items() if update.uses_gate_thresholds]
        skip_below, merge_above = self.gate.thresholds
        return [
            f"adapter.gate.skip_below: {skip_below!r}, merge_above: {merge_above!r}, with update "
            f"{self.update!r} and dropout {self.dropout!r}; "
            f"accepted: 0 and 1, or update {' or '.join(able)} and dropout 0"
        ]

    @property
    def _update(self) -> type[Update] | None:
        return UPDATES.get(self.update) if isinstance(self.update, str) else None

    @property
    def scale(self) -> float:
        """The scale of updates that have one: ``alpha / rank``, or 1 if alpha is not set."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def has_patterns(self) -> bool:
        """Whether layers may have another rank or alpha than ``rank`` and ``alpha``."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def rank_text(self) -> str:
        """The rank, or the ranks, in words."""
        ranks = sorted({self.rank, *self.rank_pattern.values()})
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

    def rank_of(self, name: str) -> int:
        """Return the rank of the layer with this name in the model."""
        key = first_match(self.rank_pattern, name)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, name: str) -> float:
        """Return the scale of the layer with this name in the model: its alpha divided by its rank."""
        key = first_match(self.alpha_pattern, name)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return 1.0 if alpha is None else alpha / self.rank_of(name)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values for JSON; the gate's are a nested table with its ``kind``."""
        values = asdict(self)
        if isinstance(self.gate, GateConfig):  # else an unknown name, which problems() reports
            values["gate"] = self.gate.to_dict()
        return values

    def to_flat_dict(self) -> dict[str, Any]:
        """Return all settings as plain values under the flat names of result files (``gate_bias``, …)."""
        flat_names = {name: flat for flat, name in FLAT_GATE_SETTINGS.items()}
        values = self.to_dict()
        gate = values["gate"]
        values["gate"] = gate.pop("kind")
        return values | {flat_names.get(name, f"gate_{name}"): value for name, value in gate.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """Create a config from plain values.

        Args:
            values: What :meth:`to_dict` returns, or the flat form of version 0.1 and of :meth:`to_flat_dict`.

        Raises:
            ConfigError: If a setting or the kind of gate is unknown. :meth:`problems` checks the values.
        """
        settings = dict(values)
        flat = {name: settings.pop(name) for name in FLAT_GATE_SETTINGS if name in settings}
        accepted = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(accepted)):
            raise ConfigError(f"adapter: unknown settings {unknown}; accepted: {', '.join(accepted)}")
        if isinstance(settings.get("gate"), Mapping):
            settings["gate"] = gate_from_dict(settings["gate"])
        config = cls(**settings)
        config.gate = _with_flat_settings(config.gate, flat)
        return config


def _taken_settings(update: type[Update]) -> tuple[str, ...]:
    return update.extra_settings + update.training_settings


def _with_flat_settings(gate: GateConfig, flat: Mapping[str, Any]) -> GateConfig:
    """Return the gate with old flat settings applied; those that its kind lacks must have no effect."""
    if not isinstance(gate, GateConfig):  # an unknown name, which problems() reports
        return gate
    values = gate.to_dict()
    for name, value in flat.items():
        if FLAT_GATE_SETTINGS[name] in values:
            values[FLAT_GATE_SETTINGS[name]] = value
        elif value != {"skip_below": 0, "merge_above": 1}.get(name, value):
            raise ConfigError(
                f"adapter.gate.{name}: {value!r}, with a {gate.kind!r} gate; accepted: gate 'token'"
            )
    return gate_from_dict(values)
