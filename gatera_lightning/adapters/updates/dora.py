"""DoRA: adapts the magnitude and the direction of a weight separately (Liu et al. 2024, arXiv 2402.09353)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.adapters.gates import GateValues
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.packed_weight import dense
from gatera_lightning.adapters.updates.base import Update, add_gated


class DoRA(Update):
    """``u(x) = m ⊙ (W0 + sBA) / ‖W0 + sBA‖_row · x − W0 x`` with s = α/r (Liu et al. 2024, equation 5).

    The magnitude m (out,) starts at the row norms of W0. The norm is detached from the graph (section 4.3 of
    the paper). Dropout acts on the low-rank path only.
    """

    name = "dora"
    formula = "m ⊙ (W0 + s·B A) x / ‖W0 + s·B A‖ − W0 x, s = alpha/rank"

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank=rank, scale=scale, dtype=dtype, generator=generator)
        self.magnitude = nn.Parameter(_row_norm(base.weight.detach(), dtype))

    @torch.no_grad()
    def row_norm(self, weight: Tensor) -> Tensor:
        """Return ``‖W0 + sBA‖`` of every row, (out,), without building the dense sum.

        Uses ``‖w‖² + 2s b·(A w) + s² b·(AAᵀ) b``.
        """
        weight, dtype = dense(weight), self.a.dtype
        own = _row_norm(weight, dtype).square()
        cross = (F.linear(weight, self.a.to(weight.dtype)).to(dtype) * self.b).sum(1)
        low_rank = ((self.b @ (self.a @ self.a.t())) * self.b).sum(1)
        norm: Tensor = (own + 2 * self.scale * cross + self.scale**2 * low_rank).clamp_min(0).sqrt()
        return norm.masked_fill(norm == 0, 1.0)  # a row of zeros (pruned, padded) must not divide by zero

    def delta(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Compute ``u(x)``: (..., in) -> (..., out)."""
        return self._delta(x, F.linear(x, base.weight), base.weight)

    def delta_with_dropout(self, x: Tensor, base: nn.Linear, dropout: nn.Module) -> Tensor:
        """Compute ``u(x)`` with dropout on the low-rank path: (..., in) -> (..., out)."""
        base_out = F.linear(x, base.weight)
        return self._delta(dropout(x), base_out, base.weight)

    def forward(self, x: Tensor, base: nn.Linear, gate: GateValues | None, dropout: nn.Module) -> Tensor:
        """Compute the output of the adapted layer with one ``W0 x``, which both terms share."""
        plain = has_plain_forward(base)
        if plain and base.bias is None:
            y = base_out = base(x)
        else:
            base_out = F.linear(x, base.weight)  # (..., out): DoRA rescales this part, not the bias
            y = base_out + base.bias if plain else base(x)
        return add_gated(y, self._delta(dropout(x), base_out, base.weight), gate)

    def _delta(self, x: Tensor, base_out: Tensor, weight: Tensor) -> Tensor:
        """Compute ``u`` from the low-rank path's input x (..., in) and ``base_out = W0 x`` (..., out)."""
        cached = self.cached()
        ratio = self.magnitude / (self.row_norm(weight) if cached is None else cached)  # (out,)
        low_rank = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale
        return (ratio - 1).to(x.dtype) * base_out + ratio.to(x.dtype) * low_rank

    def inference_constant(self, weight: Tensor) -> Tensor:
        """Return the row norms of ``W0 + sBA``, (out,)."""
        return self.row_norm(weight)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return ``m ⊙ (W0 + sBA) / ‖W0 + sBA‖_row − W0`` in the adapter's dtype, (out, in)."""
        own = weight.to(self.a.dtype)
        direction = own + self.scale * (self.b @ self.a)
        return (self.magnitude / self.row_norm(weight)).unsqueeze(1) * direction - own


def _row_norm(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of every row of a weight, (out,), which may be wider than ``dtype``."""
    wide = torch.promote_types(weight.dtype, dtype)
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    return norm.to(dtype)
