"""ABBA: the Hadamard product of two low-rank matrices (Singhal et al., ICLR 2026, arXiv 2505.14238)."""

from typing import Any

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.updates.lora import LoRA
from gatera_lightning.errors import ConfigError

EXACT_SIDE = 1024
"""Up to this smaller side of a weight, its singular vectors are computed exactly."""


class ABBA(LoRA):
    """``u(x) = (α/r) · ((B₁A₁) ⊙ (B₂A₂)) x`` with r₁ = r₂ = r/2; of rank up to r₁r₂.

    A₁ and B₁ start at the leading singular vectors of W0, ``B₁A₁ ≈ W0``, and B₂ at 0 (section 3 of the
    paper). By its Khatri–Rao form, ``(B₁A₁) ⊙ (B₂A₂) = B′A′`` with the row-wise products of the Bs and the
    column-wise products of the As, the dense matrix is never built: it is a LoRA of rank r₁r₂.
    """

    name = "abba"
    formula = "(alpha/rank)·((B1 A1) ⊙ (B2 A2)) x, each of rank/2"

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank=rank // 2, scale=scale, dtype=dtype, generator=generator)
        if not base.weight.is_meta and not torch.isfinite(base.weight).all():
            raise ConfigError(
                "adapter.update: 'abba' needs the singular vectors of a weight that has NaN or "
                "infinite values; accepted: another update, or weights that are finite"
            )
        a, b = leading_factors(base.weight.detach(), rank // 2, generator)
        self.weight_a = nn.Parameter(a.to(dtype))  # (r/2, in)
        self.weight_b = nn.Parameter(b.to(dtype))  # (out, r/2)

    @classmethod
    def rank_problem(cls, rank: int, **settings: Any) -> str | None:
        """Describe why a rank does not suit; None if it is even."""
        return None if rank % 2 == 0 else "update 'abba' gives half to each product; accepted: an even rank"

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A′ (r₁r₂, in) and B′ (out, r₁r₂) of the Khatri–Rao form."""
        a = self.weight_a.unsqueeze(1) * self.a  # (r1, r2, in)
        b = self.weight_b.unsqueeze(2) * self.b.unsqueeze(1)  # (out, r1, r2)
        return a.flatten(0, 1), b.flatten(1, 2)


@torch.no_grad()
def leading_factors(
    weight: Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``A = √Σ Vᵀ`` (r, in) and ``B = U √Σ`` (out, r) of a weight's leading singular vectors.

    For large weights, by subspace iteration: BA is then close to the best approximation of rank r.

    Args:
        weight: W0, (out, in); on the meta device, the factors are too.
        rank: r.
        generator: CPU generator that draws the start of the iteration.
    """
    out_features, in_features = weight.shape
    if weight.is_meta:
        return weight.new_empty(rank, in_features), weight.new_empty(out_features, rank)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if min(weight.shape) <= EXACT_SIDE:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        start = torch.randn(in_features, rank + 8, generator=generator, dtype=wide.dtype)
        basis = torch.linalg.qr(wide @ start.to(wide.device)).Q  # (out, r + 8)
        for _ in range(4):
            basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.t() @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.t() @ wide, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    # LAPACK's matrices are stored by columns, and what is sent to other ranks must be stored by rows.
    return (root.unsqueeze(1) * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
