"""LoRA: a low-rank update of a frozen weight (Hu et al. 2021, arXiv 2106.09685)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def low_rank_factors(
    base: nn.Linear, rank: int, dtype: torch.dtype, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) Kaiming-uniform with a = √5 and B (out, r) zero, so that ``BA = 0`` at the first step.

    Drawn on the CPU: the same generator gives the same adapter on every device and every rank.
    """
    a = torch.empty(rank, base.in_features, dtype=dtype, device="cpu")
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    b = torch.zeros(base.out_features, rank, dtype=dtype, device="cpu")
    return nn.Parameter(a.to(base.weight.device)), nn.Parameter(b.to(base.weight.device))


class LoRA(nn.Module):
    """``u(x) = (α/r) · B (A x)``; A (r, in), B (out, r)."""

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
        self.scale = scale

    def forward(self, y: Tensor, x: Tensor, base_out: Tensor, weight: Tensor, g: Tensor | None) -> Tensor:
        """``y + g · u(x)``; the gate meets the r-dimensional middle, where it costs least. y, x -> (..., out)."""
        down = F.linear(x, self.a.to(x.dtype))  # (..., r)
        factor = self.scale if g is None else (self.scale * g).unsqueeze(-1).to(down.dtype)
        return y + F.linear(down * factor, self.b.to(x.dtype)).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """``(α/r) · BA`` in the adapter's dtype, (out, in): what merging adds to ``weight``."""
        return self.scale * (self.b @ self.a)
