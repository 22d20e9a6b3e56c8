"""ABBA: the Hadamard product of two low-rank matrices (Singhal et al., ICLR 2026, arXiv 2505.14238)."""

from typing import Any

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gates import GateValues
from gatera_lightning.adapters.kernels.differentiation import transforms_are_active
from gatera_lightning.adapters.kernels.khatri_rao import khatri_rao_factors, khatri_rao_update
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
        return khatri_rao_factors(self.weight_a, self.weight_b, self.a, self.b)

    def delta(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Compute ``u(x)``: (..., in) -> (..., out)."""
        if _uses_plain_operations(x):
            return super().delta(x, base)
        return self._update(x, None)

    def forward(self, x: Tensor, base: nn.Linear, gate: GateValues | None, dropout: nn.Module) -> Tensor:
        """Compute the output of the adapted layer; the gate multiplies ``A′ x``."""
        if _uses_plain_operations(x):
            return super().forward(x, base, gate, dropout)
        y: Tensor = base(x)
        return y + self._update(dropout(x), None if gate is None else gate.values).to(y.dtype)

    def _update(self, x: Tensor, g: Tensor | None) -> Tensor:
        factors = self.weight_a, self.weight_b, self.a, self.b
        return khatri_rao_update(x, *factors, scale=self.scale, g=g)


def _uses_plain_operations(x: Tensor) -> bool:
    """Return whether to leave differentiation to autograd: without gradients, for torch.func and autocast."""
    device = "cpu" if x.is_meta else x.device.type
    return not torch.is_grad_enabled() or transforms_are_active() or torch.is_autocast_enabled(device)


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
