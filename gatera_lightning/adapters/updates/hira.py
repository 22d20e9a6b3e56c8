"""HiRA: a high-rank update from low-rank factors by the Hadamard product (Huang et al., ICLR 2025)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.adapters.gates import GateValues
from gatera_lightning.adapters.kernels.differentiation import transforms_are_active
from gatera_lightning.adapters.kernels.hadamard import (
    add_gated_hadamard,
    add_gated_product,
    hadamard_weight,
    merged_hadamard,
)
from gatera_lightning.adapters.kernels.saturated_gates import partitioned_hadamard
from gatera_lightning.adapters.kernels.stochastic_rounding import (
    RoundingDraw,
    draw_rounding,
    merges_accurately,
)
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.updates.base import Update


class HiRA(Update):
    """``u(x) = (W0 ⊙ BA) x``, of rank up to ``r · rank(W0)`` (Huang et al., OpenReview TwJrTz9cRS).

    Args:
        base: The frozen layer.
        stochastic_rounding: Whether a training step in bfloat16 may use ``W0 + W0 ⊙ BA``, rounded by a draw.
        settings: Those of every update.
    """

    name = "hira"
    formula = "(W0 ⊙ B A) x"
    has_scale = False
    uses_gate_thresholds = True
    training_settings = ("stochastic_rounding",)

    def __init__(self, base: nn.Linear, *, stochastic_rounding: bool = False, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.stochastic_rounding = stochastic_rounding

    def delta(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Compute ``(W0 ⊙ BA) x``: (..., in) -> (..., out)."""
        cached = self.cached()
        if cached is None and torch.is_grad_enabled() and not transforms_are_active():
            zeros = x.new_zeros((), dtype=base.weight.dtype).expand(*x.shape[:-1], base.out_features)
            return add_gated_hadamard(zeros, x, base.weight, *self.factors())  # saves no dense factor
        weight = hadamard_weight(base.weight, *self.factors()) if cached is None else cached
        return F.linear(x.to(weight.dtype), weight)

    def forward(self, x: Tensor, base: nn.Linear, gate: GateValues | None, dropout: nn.Module) -> Tensor:
        """Compute the output of the adapted layer by the cheapest form that the settings allow."""
        g = None if gate is None else gate.values
        cached = self.cached()
        if cached is not None:
            y: Tensor = base(x)  # (..., out)
            if gate is not None and gate.rounded is not None and _all_are_closed(gate.rounded):
                return y
            return add_gated_product(y, dropout(x), cached, g)
        fused = self.training and torch.is_grad_enabled() and isinstance(dropout, nn.Identity)
        if fused and has_plain_forward(base) and not transforms_are_active():
            a, b = self.factors()
            constant = None if gate is None else gate.constant
            if (gate is None or constant is not None) and not _autocast_is_enabled(x):
                draw = self._rounding(base.weight)
                if merges_accurately(base.weight, draw):
                    scaled_b = b if constant is None else b * constant  # g (W0 ⊙ BA) = W0 ⊙ (gB) A
                    return merged_hadamard(x, base.weight, base.bias, a, scaled_b, draw)
            if gate is not None and gate.rounded is not None and not x.is_meta:
                draw = self._rounding(base.weight)
                weights = base.weight, base.bias, a, b
                return partitioned_hadamard(x, *weights, gate.rounded, gate.graded, draw)
        return add_gated_hadamard(base(x), dropout(x), base.weight, *self.factors(), g)

    def _rounding(self, weight: Tensor) -> RoundingDraw | None:
        """Draw how the merged weight is rounded; None to leave open tokens their two terms."""
        return draw_rounding(weight) if self.stochastic_rounding and weight.dtype == torch.bfloat16 else None

    def inference_constant(self, weight: Tensor) -> Tensor:
        """Return ``W0 ⊙ BA`` in W0's dtype, (out, in), as the forward computes it."""
        return hadamard_weight(weight, *self.factors())

    def inference_constant_bytes(self, weight: Tensor) -> int:
        """Return the size of the adapted weight in bytes."""
        return weight.nbytes

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return ``W0 ⊙ BA`` in the adapter's dtype, (out, in)."""
        a, b = self.factors()
        return weight.to(a.dtype) * (b @ a)


def _all_are_closed(gates: Tensor) -> bool:
    """Whether every gate is 0, so that the update need not be read; only on a CPU, which need not wait."""
    return gates.device.type == "cpu" and not gates.any()


def _autocast_is_enabled(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
