"""Gates, which decide how much of the update a layer applies, ``g = σ(z)`` in [0, 1], and their settings.

To add a gate, write a :class:`Gate` and a :class:`GateConfig` that builds it, and pass the latter to
:func:`register_gate`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.kernels.gate_logit import token_logit
from gatera_lightning.errors import ConfigError


class GateValues(NamedTuple):
    """The gate values of a forward pass, and thresholds beyond which an update may treat them as 0 or 1."""

    values: Tensor
    """g, of shape (...), one value per token."""

    skip_below: float = 0.0
    """In training, an update may treat values below this as 0."""

    merge_above: float = 1.0
    """In training, an update may treat values above this as 1."""

    @property
    def has_thresholds(self) -> bool:
        """Whether any value may be treated as 0 or 1."""
        return (self.skip_below, self.merge_above) != (0.0, 1.0)


class Gate(nn.Module, ABC):
    """Computes the logit ``z`` of the gate ``g = σ(z)``.

    A gate returns ``z`` rather than ``g`` because the entropy and its gradient need the logit: in bfloat16,
    ``1 − g`` is exactly 0 from z = 7 on.
    """

    depends_on_token: ClassVar[bool]
    """Whether the logit differs between tokens. A gate that does not can be merged into the weight."""

    needs_update: ClassVar[bool] = False
    """Whether :meth:`forward` reads ``base_out`` and ``update_out``, which rules out fused forms."""

    @abstractmethod
    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Compute the gate's logit.

        Args:
            x: Input of the adapted layer, (..., in).
            base_out: ``W0 x``, (..., out), without the bias; given only to a gate that ``needs_update``.
            update_out: ``u(x)``, (..., out); given only to a gate that ``needs_update``.

        Returns:
            The logits, (...), in the adapter's dtype.
        """

    def values(self, logit: Tensor) -> GateValues:
        """Return the gate values for these logits: ``σ(z)`` unless a gate overrides it.

        Reports, captures and ``train/gate_mean`` show ``σ(z)`` of the logits. Override this only if they may
        differ from what the layer applies: for a hard gate with a straight-through gradient, for instance.
        """
        return GateValues(torch.sigmoid(logit))

    def constant_value(self) -> Tensor:
        """Return the value of every token, (1,); required of a gate that does not depend on the token."""
        raise NotImplementedError(
            f"{type(self).__name__}: implement constant_value, or set depends_on_token = True"
        )

    def linear_logit(self) -> tuple[Tensor, float] | None:
        """Return ``(w, b)`` if the logit is exactly ``w·x + b``, which speeds up decoding; else None."""
        return None


class StaticGate(Gate):
    """``z = b``: one learned scalar per layer (static-gating ablation of GateRA, arXiv 2511.17582)."""

    depends_on_token = False

    def __init__(self, *, bias: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the bias, expanded to one logit per token: (..., in) -> (...)."""
        return self.bias.expand(x.shape[:-1])

    def constant_value(self) -> Tensor:
        """Return ``σ(b)``, (1,)."""
        return torch.sigmoid(self.bias)


class TokenGate(Gate):
    """``z = w·x + b``: one scalar per token, ``in + 1`` parameters per layer (GateRA, arXiv 2511.17582)."""

    depends_on_token = True

    def __init__(
        self,
        in_features: int,
        *,
        bias: float,
        thresholds: tuple[float, float] = (0.0, 1.0),
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))
        self.set_thresholds(*thresholds)

    def set_thresholds(self, skip_below: float, merge_above: float) -> None:
        """Set the values beyond which an update may treat this gate as 0 or 1 in training."""
        self._thresholds = skip_below, merge_above

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the logit of every token: (..., in) -> (...)."""
        return token_logit(x, self.weight, self.bias)

    def values(self, logit: Tensor) -> GateValues:
        """Return ``σ(z)`` and this gate's thresholds."""
        return GateValues(torch.sigmoid(logit), *self._thresholds)

    def linear_logit(self) -> tuple[Tensor, float] | None:
        """Return ``(w, b)``; None for a subclass, which may compute its logit differently."""
        return (self.weight.detach(), float(self.bias)) if type(self) is TokenGate else None


@dataclass
class GateConfig(ABC):
    """Settings of one kind of gate; each kind is a subclass with fields of its own."""

    kind: ClassVar[str]
    """Name of the kind in configs and adapter folders."""

    formula: ClassVar[str]
    """What the gate computes, on one line for ``--help``."""

    # Declare `entropy_weight: float = 0.01` in your config to add the entropy term. Without an annotation, it
    # is not a setting.
    entropy_weight = 0.0

    lr_multiplier: float = 1.0
    """Learning rate of the gate's parameters, as a multiple of optimizer.lr."""

    @abstractmethod
    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> Gate | None:
        """Create the gate of one layer with ``in_features`` inputs; None for ``g = 1``."""

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        if is_finite_number(self.lr_multiplier) and self.lr_multiplier >= 0:
            return []
        return [f"adapter.gate.lr_multiplier: {self.lr_multiplier!r}; accepted: a number of at least 0"]

    @property
    def thresholds(self) -> tuple[float, float]:
        """Training may treat gates below the first as 0, and above the second as 1."""
        return 0.0, 1.0

    @property
    def has_thresholds(self) -> bool:
        """Whether training treats any gates as 0 or 1."""
        return self.thresholds != (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and all settings as plain values for JSON; :func:`gate_from_dict` reads them."""
        return {"kind": self.kind, **asdict(self)}


@dataclass
class NoGateConfig(GateConfig):
    """No gate: the update always applies in full."""

    kind = "none"
    formula = "1"

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: ``g = 1`` needs no module."""
        return None


@dataclass
class SigmoidGateConfig(GateConfig):
    """Settings that the static and the token gate share."""

    bias: float = 0.0
    """Initial gate logit b: 0 starts every gate at g = 0.5, -2 at g = 0.12."""

    entropy_weight: float = 0.01
    """Weight λ of the entropy term in the loss, which pushes gates towards 0 or 1; 0 turns it off."""

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        found = super().problems()
        if not is_finite_number(self.bias):
            found.append(f"adapter.gate.bias: {self.bias!r}; accepted: a finite number")
        if not (is_finite_number(self.entropy_weight) and self.entropy_weight >= 0):
            found.append(
                f"adapter.gate.entropy_weight: {self.entropy_weight!r}; accepted: a number of at least 0"
            )
        return found


@dataclass
class StaticGateConfig(SigmoidGateConfig):
    """One learned scalar per layer, the same for every token."""

    kind = "static"
    formula = "σ(b), one scalar per layer"

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> StaticGate:
        """Create a :class:`StaticGate`."""
        return StaticGate(bias=self.bias, dtype=dtype, device=device)


@dataclass
class TokenGateConfig(SigmoidGateConfig):
    """One scalar per token, computed from the layer's input (GateRA)."""

    kind = "token"
    formula = "σ(w·x + b), one scalar per token"

    skip_below: float = 0.0
    """In training, treat gates below this as 0, at 2 large matmuls per token instead of 5. 0 skips none."""

    merge_above: float = 1.0
    """In training, treat gates above this as 1 and use the merged weight, at 3 large matmuls per token
    instead of 5. 1 merges none. In bfloat16, merging loses changes below about 0.4 % of a weight."""

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> TokenGate:
        """Create a :class:`TokenGate`."""
        return TokenGate(in_features, bias=self.bias, thresholds=self.thresholds, dtype=dtype, device=device)

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        thresholds = threshold_problems(self.skip_below, self.merge_above)
        return super().problems() + [f"adapter.gate.{problem}" for problem in thresholds]

    @property
    def thresholds(self) -> tuple[float, float]:
        """Training treats gates below the first as 0, and above the second as 1."""
        return self.skip_below, self.merge_above


ConfigClass = TypeVar("ConfigClass", bound=type[GateConfig])

GATES: dict[str, type[GateConfig]] = {
    config.kind: config for config in (NoGateConfig, StaticGateConfig, TokenGateConfig)
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


def threshold_problems(skip_below: Any, merge_above: Any) -> list[str]:
    """Return one message for each invalid threshold, without a prefix for the section."""
    found = []
    if not (is_finite_number(skip_below) and 0 <= skip_below <= 0.5):
        found.append(f"skip_below: {skip_below!r}; accepted: a gate value from 0 (skips none) to 0.5")
    if not (is_finite_number(merge_above) and 0.5 <= merge_above <= 1):
        found.append(f"merge_above: {merge_above!r}; accepted: a gate value from 0.5 to 1 (merges none)")
    return found


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a finite int or float; a bool is not a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
