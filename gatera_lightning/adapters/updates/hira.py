"""HiRA: a high-rank update from low-rank factors by the Hadamard product (Huang et al., ICLR 2025)."""

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
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.updates.base import Update


class HiRA(Update):
    """``u(x) = (W0 ⊙ BA) x``, of rank up to ``r · rank(W0)`` (Huang et al., OpenReview TwJrTz9cRS)."""

    name = "hira"
    formula = "(W0 ⊙ B A) x"
    has_scale = False
    uses_gate_thresholds = True

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
            return add_gated_product(base(x), dropout(x), cached, g)
        fused = self.training and torch.is_grad_enabled() and isinstance(dropout, nn.Identity)
        if fused and has_plain_forward(base) and not transforms_are_active():
            if gate is None and _merging_is_accurate(x, base.weight):
                return merged_hadamard(x, base.weight, base.bias, *self.factors())
            if gate is not None and gate.rounded is not None and not x.is_meta:
                weights = base.weight, base.bias, *self.factors()
                return partitioned_hadamard(x, *weights, gate.rounded, gate.graded)
        return add_gated_hadamard(base(x), dropout(x), base.weight, *self.factors(), g)

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


def _merging_is_accurate(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``W0 + W0 ⊙ BA`` can replace its two terms: 16-bit dtypes would lose small updates."""
    autocast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
    return weight.dtype.itemsize >= 4 and not autocast
