"""Decode a low-rank update behind a threshold gate: the gate decides before the update is computed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.adapters.gates import Gate
from gatera_lightning.adapters.kernels.autocast import autocast_disabled
from gatera_lightning.adapters.layer import AdaptedLinear, GateListener
from gatera_lightning.adapters.unchanged_parameters import UnchangedParameters
from gatera_lightning.adapters.updates.base import require_no_grad


class RankSpacePath:
    """Computes ``u(x) = B z`` with ``z = A x`` only for the tokens whose gates are open.

    The gate reads the norms of both outputs, and ``‖B z‖² = zᵀ (BᵀB) z`` takes r² products instead of
    out · r. Equal to the layer itself up to rounding, which decides tokens whose ratio is almost τ.

    Args:
        layer: An adapted layer for which :func:`fits` holds.
    """

    @torch.no_grad()
    def __init__(self, layer: AdaptedLinear) -> None:
        factors, gate = layer.update.low_rank_factors(), layer.gate
        assert factors is not None
        assert gate is not None
        self.frozen_weight, self.bias = layer.base.weight, layer.base.bias
        dtype = self.frozen_weight.dtype
        self.a, self.b = (factor.detach().to(dtype) for factor in factors)
        wide = factors[1].detach().double()
        self.gram = (wide.t() @ wide).to(factors[1].dtype)  # (r, r)
        self.gate: Gate = gate
        self.unchanged = UnchangedParameters(layer)

    @staticmethod
    def fits(layer: AdaptedLinear) -> bool:
        """Return whether a layer's update has a low rank and its gate reads only norms."""
        reads_norms = layer.gate is not None and layer.gate.reads_norms
        return reads_norms and layer.update.low_rank_factors() is not None

    def __call__(self, x: Tensor, listener: GateListener | None) -> Tensor:
        """Compute the layer's output; synchronizes with the device once to count the open gates.

        Args:
            x: Input, (..., in).
            listener: Receives the gate's logits (...).

        Returns:
            The output, (..., out), in the backbone's dtype.
        """
        require_no_grad()
        self.unchanged.check()
        with autocast_disabled(x):
            rows = x.flatten(0, -2).to(self.frozen_weight.dtype)  # (tokens, in)
            y = F.linear(rows, self.frozen_weight)  # (tokens, out)
            z = F.linear(rows, self.a)  # (tokens, r)
            logit = self.gate.norm_logit(_norm(y, self.gram.dtype), self._update_norm(z))  # (tokens,)
            if listener is not None:
                listener(logit.view(x.shape[:-1]))
            kept = (logit > 0).nonzero().squeeze(1)
            if len(kept):
                y.index_add_(0, kept, F.linear(z.index_select(0, kept), self.b))
            if self.bias is not None:
                y += self.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def _update_norm(self, z: Tensor) -> Tensor:
        """Compute ``‖B z‖``: (tokens, r) -> (tokens,)."""
        wide = z.to(self.gram.dtype)
        return ((wide @ self.gram) * wide).sum(-1).clamp_min(0).sqrt()  # rounding may make it negative


def _norm(y: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(y, dim=-1, dtype=dtype)
    return norm
