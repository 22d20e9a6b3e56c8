"""The contract of a gate, and of its settings."""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class GateValues(NamedTuple):
    """The gate values of a forward pass, and what an update may save because of them."""

    values: Tensor
    """g, of shape (...), one value per token."""

    rounded: Tensor | None = None
    """Values of which many are exactly 0 or 1, (...), for an update that saves work on such tokens: one with
    0 needs only the frozen weight, and one with 1 only the merged weight. None if there are none."""

    graded: Tensor | None = None
    """Indices into the flattened tokens of those whose gradient the gate uses although they are saturated,
    (n,); None for none."""

    constant: Tensor | None = None
    """The value that all tokens share, (1,), which an update may multiply into a factor; None if they differ.
    """


class Gate(nn.Module, ABC):
    """Computes the logit ``z`` of the gate ``g = σ(z)``.

    A gate returns ``z`` rather than ``g`` because the entropy and its gradient need the logit: in bfloat16,
    ``1 − g`` is exactly 0 from z = 7 on.
    """

    depends_on_token: ClassVar[bool]
    """Whether the logit differs between tokens. A gate that does not can be merged into the weight."""

    needs_update: ClassVar[bool] = False
    """Whether :meth:`forward` reads ``base_out`` and ``update_out``, which rules out fused forms."""

    reads_norms: ClassVar[bool] = False
    """Whether a gate that ``needs_update`` reads only the norms of both outputs, by :meth:`norm_logit`."""

    decides: ClassVar[bool] = False
    """Whether the values are 0 or 1 in evaluation: 1 where the logit is above 0."""

    selects_tokens: ClassVar[bool] = False
    """Whether it knows the tokens with gate 1 without their logits, so that a layer computes the update for
    them only; others have gate 0, and the frozen layer's own output."""

    decays: ClassVar[bool] = True
    """Whether the optimizer's weight decay applies to the parameters."""

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

    def selected_tokens(self, x: Tensor) -> Tensor:
        """Return the indices into the flattened tokens with gate 1: (..., in) -> (n,).

        Required of a gate that ``selects_tokens``.
        """
        raise NotImplementedError(f"{type(self).__name__}: implement selected_tokens")

    def norm_logit(self, base_norm: Tensor, update_norm: Tensor) -> Tensor:
        """Return the logit (...) from ``‖W0 x‖`` and ``‖u(x)‖``, each (...); required of ``reads_norms``."""
        raise NotImplementedError(f"{type(self).__name__}: implement norm_logit, or set reads_norms = False")

    def constrain(self) -> None:
        """Move the parameters back into their range, after a step of the optimizer; here, they have none."""

    def constant_value(self) -> Tensor:
        """Return the value of every token, (1,); required of a gate that does not depend on the token."""
        raise NotImplementedError(
            f"{type(self).__name__}: implement constant_value, or set depends_on_token = True"
        )

    def linear_logit(self) -> tuple[Tensor, float] | None:
        """Return ``(w, b)`` if the logit is exactly ``w·x + b``, which speeds up decoding; else None."""
        return None


@dataclass
class GateConfig(ABC):
    """Settings of one kind of gate; each kind is a subclass with fields of its own."""

    kind: ClassVar[str]
    """Name of the kind in configs and adapter folders."""

    formula: ClassVar[str]
    """What the gate computes, on one line for ``--help``."""

    needs_mask: ClassVar[bool] = False
    """Whether every forward pass needs a mask of the tokens (:func:`~gatera_lightning.position_mask`)."""

    # Declare `entropy_weight: float = 0.01` in your config to add the entropy term. Without an annotation, it
    # is not a setting.
    entropy_weight = 0.0

    # Declared by gates of adapters that draft: the number of embeddings that draft rows learn to read.
    mask_embeddings = 0

    lr_multiplier: float = 1.0
    """Learning rate of the gate's parameters, as a multiple of optimizer.lr."""

    @abstractmethod
    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> Gate | None:
        """Create the gate of one layer with ``in_features`` inputs; None for ``g = 1``."""

    def build_for(self, base: nn.Linear, dtype: torch.dtype) -> Gate | None:
        """Create the gate of a layer; override this instead of :meth:`build` if the gate needs more of it."""
        return self.build(base.in_features, dtype=dtype, device=base.weight.device)

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        if is_finite_number(self.lr_multiplier) and self.lr_multiplier >= 0:
            return []
        return [f"adapter.gate.lr_multiplier: {self.lr_multiplier!r}; accepted: a number of at least 0"]

    @property
    def thresholds(self) -> tuple[float, float]:
        """Training treats gates below the first as 0, and above the second as 1."""
        return 0.0, 1.0

    @property
    def has_thresholds(self) -> bool:
        """Whether training treats any gates as 0 or 1."""
        return self.thresholds != (0.0, 1.0)

    @property
    def saturates(self) -> bool:
        """Whether a training step may compute saturated tokens apart from the others."""
        return self.has_thresholds

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and all settings as plain values for JSON; :func:`gate_from_dict` reads them."""
        return {"kind": self.kind, **asdict(self)}


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
