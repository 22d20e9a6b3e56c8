"""DoRA: magnitude and direction of a weight adapted apart (Liu et al. 2024, arXiv 2402.09353)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.adapters.kernels.hadamard import without_gradients
from gatera_lightning.adapters.updates.lora import low_rank_factors


class DoRA(nn.Module):
    """``u(x) = m ⊙ (W0 + sBA) / ‖W0 + sBA‖_row · x − W0 x``, s = α/r; m (out,) starts at the row norms of W0.

    The norm is detached from the graph (the paper's section 4.3). Dropout acts on the low-rank path only.
    """

    reads_base_out = True

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.a, self.b = low_rank_factors(base, rank, dtype, generator)
        self.scale = scale
        own = torch.linalg.vector_norm(base.weight.detach(), dim=1, dtype=dtype)
        self.magnitude = nn.Parameter(own)
        self.kept: Tensor | None = None
        """:meth:`constant`, inside ``prepared_for_inference``."""

    @torch.no_grad()
    def row_norm(self, weight: Tensor) -> Tensor:
        """``‖W0 + sBA‖`` of every row (out,), from ``‖w‖² + 2s b·(A w) + s² b·(AAᵀ) b``: no dense (out, in) copy."""
        dtype = self.a.dtype
        own = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        cross = (F.linear(weight, self.a.to(weight.dtype)).to(dtype) * self.b).sum(1)
        low_rank = ((self.b @ (self.a @ self.a.t())) * self.b).sum(1)
        norm = (own + 2 * self.scale * cross + self.scale**2 * low_rank).clamp_min(0).sqrt()
        return norm.masked_fill(
            norm == 0, 1.0
        )  # a row of zeros (pruned, padded) has no direction, and must not divide

    def forward(self, y: Tensor, x: Tensor, base_out: Tensor, weight: Tensor, g: Tensor | None) -> Tensor:
        """``y + g · u(x)``; y (..., out), x (..., in), base_out = W0 x (..., out) -> (..., out)."""
        norm = self.row_norm(weight) if self.kept is None else without_gradients(self.kept)
        ratio = self.magnitude / norm  # (out,)
        low_rank = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale
        u = (ratio - 1).to(x.dtype) * base_out + ratio.to(x.dtype) * low_rank
        return y + (u if g is None else u * g.unsqueeze(-1).to(u.dtype)).to(y.dtype)

    def constant(self, weight: Tensor) -> Tensor:
        """The row norms, (out,)."""
        return self.row_norm(weight)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """``m ⊙ (W0 + sBA) / ‖W0 + sBA‖_row − W0`` in the adapter's dtype, (out, in)."""
        own = weight.to(self.a.dtype)
        direction = own + self.scale * (self.b @ self.a)
        return (self.magnitude / self.row_norm(weight)).unsqueeze(1) * direction - own
