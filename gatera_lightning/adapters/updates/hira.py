"""HiRA: a high-rank update from low-rank factors by the Hadamard product (Huang et al., ICLR 2025, TwJrTz9cRS)."""

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.kernels.hadamard import (
    hadamard_weight,
    with_gated,
    with_gated_hadamard,
    without_gradients,
)
from gatera_lightning.adapters.updates.lora import low_rank_factors


class HiRA(nn.Module):
    """``u(x) = (W0 ⊙ BA) x``, of rank up to ``r · rank(W0)``; A (r, in), B (out, r). It has no scale."""

    reads_base_out = False

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
        self.kept: Tensor | None = None
        """:meth:`constant`, inside ``prepared_for_inference``."""

    def forward(self, y: Tensor, x: Tensor, base_out: Tensor, weight: Tensor, g: Tensor | None) -> Tensor:
        """``y + g · u(x)``; y (..., out), x (..., in), weight W0 (out, in), g (...) or None -> (..., out)."""
        if self.kept is not None:
            return with_gated(y, x, without_gradients(self.kept), g)
        return with_gated_hadamard(y, x, weight, self.a, self.b, g)

    @torch.no_grad()
    def constant(self, weight: Tensor) -> Tensor:
        """``W0 ⊙ BA`` in W0's dtype, (out, in), as the forward computes it."""
        return hadamard_weight(weight, self.a, self.b)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """``W0 ⊙ BA`` in the adapter's dtype, (out, in)."""
        return weight.to(self.a.dtype) * (self.b @ self.a)
