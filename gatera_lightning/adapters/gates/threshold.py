"""The threshold gate of TS-PEFT: only tokens with a large update keep it (Ma et al., arXiv 2511.16147)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gates.base import Gate, GateConfig, GateValues, is_finite_number
from gatera_lightning.adapters.gates.hard import sparsity_problem
from gatera_lightning.adapters.gates.straight_through import straight_through
from gatera_lightning.adapters.kernels.differentiation import first_order_only, transforms_are_active

LARGEST_LOGIT = 10.0
"""Bound of |z|, so that a threshold of 0 has a finite logit and gradient."""

_SMALLEST_OPEN = 1e-6
"""Logit of a token at its threshold, which is kept: σ(z) is above ½ in float32, too."""


class _ThresholdLogit(torch.autograd.Function):
    """``z = ln r − ln τ`` within its bound, with gradient ``dz/dτ = −1/τ`` and none for r."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, threshold: Tensor) -> Tensor:
        bounded = _bounded_threshold(ratio, threshold)
        ctx.save_for_backward(ratio, bounded)
        return _logit(ratio, threshold, bounded)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dz: Tensor) -> tuple[None, Tensor]:
        ratio, bounded = ctx.saved_tensors
        slope = torch.where(ratio > 0, -1 / bounded, 0.0)
        return None, (dz * slope).sum().unsqueeze(0)


def _bounded_threshold(ratio: Tensor, threshold: Tensor) -> Tensor:
    """Return τ (1,) as one value per token (...), large enough that no logit exceeds its bound.

    With τ = 0, σ(z) then has the slope of the limit, ``dσ/dτ = −1/r``.
    """
    return torch.maximum(threshold.clamp_min(0), ratio * math.exp(-LARGEST_LOGIT))


def _logit(ratio: Tensor, threshold: Tensor, bounded: Tensor) -> Tensor:
    z = (ratio.log() - bounded.log()).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    z = torch.where(bounded == 0, LARGEST_LOGIT, z)  # r = 0 = τ: nothing to skip yet
    kept = ratio >= threshold
    return torch.where(kept, z.clamp_min(_SMALLEST_OPEN), z.clamp_max(0.0))


class ThresholdGate(Gate):
    """``S = 1[‖u(x)‖ ≥ τ ‖W0 x‖]`` with one learned τ (Ma et al., arXiv 2511.16147).

    The paper prints the rule and not how τ learns. Here, with ``r = ‖u‖/‖W0 x‖`` and ``S̃ = σ(ln r − ln τ) =
    r/(r + τ)``, S has the gradient of S̃: ``∂L/∂ln τ = −Σ (dy·u) S̃(1−S̃)``. The ratio r gets none.

    Args:
        threshold: Initial τ.
        dtype: Dtype of τ.
        device: Its device.
    """

    depends_on_token = True
    needs_update = True
    reads_norms = True
    decides = True
    decays = False  # a step towards 0 keeps more tokens, whatever the loss says

    def __init__(self, *, threshold: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((1,), threshold, dtype=dtype, device=device))

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return ``ln r − ln τ`` of every token, within ±10: both outputs (..., out) -> (...)."""
        assert base_out is not None  # because of needs_update
        assert update_out is not None
        dtype = self.threshold.dtype
        base_norm, update_norm = (
            torch.linalg.vector_norm(out.detach(), dim=-1, dtype=dtype) for out in (base_out, update_out)
        )
        return self.norm_logit(base_norm, update_norm)

    def norm_logit(self, base_norm: Tensor, update_norm: Tensor) -> Tensor:
        """Return ``ln r − ln τ`` of every token from ``‖W0 x‖`` and ``‖u(x)‖``, each (...)."""
        limits = torch.finfo(base_norm.dtype)
        # W0 x may be 0, in a pruned layer for instance: any update is then large.
        ratio = (update_norm / base_norm.clamp_min(limits.tiny)).clamp_max(1 / limits.eps)
        return threshold_logit(ratio, self.threshold)

    @torch.no_grad()
    def constrain(self) -> None:
        """Move a negative τ to 0, which has the same values: a step may be larger than τ.

        Below 0, τ would take as many steps to rise again as it took to fall.
        """
        self.threshold.clamp_(min=0)

    def values(self, logit: Tensor) -> GateValues:
        """Return 1 for tokens that keep their update and 0 for others, with the gradient of ``σ(z)``."""
        kept = torch.where(logit.isnan(), logit, (logit > 0).to(logit.dtype))  # a NaN reaches the loss
        if not self.training:
            return GateValues(kept)
        return GateValues(straight_through(kept, torch.sigmoid(logit), 1.0).values)


def threshold_logit(ratio: Tensor, threshold: Tensor) -> Tensor:
    """Compute ``z = ln r − ln τ`` within ±10, differentiable by τ; above 0 exactly if ``r ≥ τ``.

    Args:
        ratio: r, (...).
        threshold: τ, (1,); a negative value counts as 0, where z is 10 and the slope is that of the limit.
    """
    if transforms_are_active():
        return _logit(ratio, threshold, _bounded_threshold(ratio, threshold))
    return _ThresholdLogit.apply(ratio, threshold)  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class ThresholdGateConfig(GateConfig):
    """A token keeps its update if it is large compared with the frozen layer's output (TS-PEFT)."""

    kind = "threshold"
    formula = "1[‖u(x)‖ >= τ·‖W0 x‖], one learned τ per layer"

    threshold: float = 0.0
    """Initial τ. Training must start at 0, which keeps every token: while B = 0, a threshold above 0 would
    close every gate, and a closed gate passes no gradient to A and B."""

    sparsity_weight: float = 0.01
    """Weight of the mean of r/(r + τ) in the loss, which raises the thresholds; 0 turns it off."""

    lr_multiplier: float = 0.1
    """Learning rate of τ, as a multiple of optimizer.lr."""

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> ThresholdGate:
        """Create a :class:`ThresholdGate`."""
        return ThresholdGate(threshold=self.threshold, dtype=dtype, device=device)

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        found = super().problems() + sparsity_problem(self.sparsity_weight)
        if not (is_finite_number(self.threshold) and self.threshold >= 0):
            found.append(f"adapter.gate.threshold: {self.threshold!r}; accepted: a number of at least 0")
        elif self.threshold > 0:
            found.append(
                f"adapter.gate.threshold: {self.threshold!r}: no token would ever be open, because the "
                "update starts at 0 and a closed gate passes no gradient to it; accepted: 0, from which the "
                "threshold rises in training"
            )
        return found
