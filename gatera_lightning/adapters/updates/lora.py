"""LoRA: a low-rank update of a frozen weight (Hu et al. 2021, arXiv 2106.09685)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.adapters.gates import GateValues
from gatera_lightning.adapters.updates.base import Update


class LoRA(Update):
    """``u(x) = (α/r) · B (A x)`` (Hu et al. 2021, equation 3)."""

    name = "lora"
    formula = "(alpha/rank)·B A x"

    def delta(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Compute ``(α/r) · B (A x)``: (..., in) -> (..., out)."""
        a, b = self.factors()
        return F.linear(F.linear(x, a.to(x.dtype)) * self.scale, b.to(x.dtype))

    def forward(self, x: Tensor, base: nn.Linear, gate: GateValues | None, dropout: nn.Module) -> Tensor:
        """Compute the output of the adapted layer; the gate multiplies ``A x``, which has only r elements."""
        y: Tensor = base(x)
        x = dropout(x)
        a, b = self.factors()
        down = F.linear(x, a.to(x.dtype))  # (..., r)
        factor = self.scale if gate is None else (self.scale * gate.values).unsqueeze(-1).to(down.dtype)
        return y + F.linear(down * factor, b.to(x.dtype)).to(y.dtype)

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and ``(α/r) · B`` (out, r)."""
        a, b = self.factors()
        return a, b * self.scale

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return ``(α/r) · BA``, (out, in)."""
        a, b = self.factors()
        return (b @ a) * self.scale
