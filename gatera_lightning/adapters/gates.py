"""Gates: how much of the update a token receives, ``g = σ(z)`` in [0, 1] (GateRA, Ou et al., AAAI 2026).

A gate returns its logit ``z``, not ``g``: entropy and its gradient need the logit (in bf16, ``1 − g`` is exactly 0
from z = 7 on), and a logit costs the same to keep. ``z`` has the shape ``x.shape[:-1]`` and the adapter's dtype.
"""

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.kernels.hadamard import token_logit


class StaticGate(nn.Module):
    """``z = b``: one learned scalar per layer, the same for every token (GateRA's "static gating" ablation)."""

    depends_on_token = False

    def __init__(self, in_features: int, *, bias: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The logit, expanded to x (..., in) -> (...)."""
        return self.bias.expand(x.shape[:-1])


class TokenGate(nn.Module):
    """``z = w·x + b``: one scalar per token, ``in + 1`` parameters per layer (GateRA, ``g(x) = σ(w_g·x + b_g)``)."""

    depends_on_token = True

    def __init__(self, in_features: int, *, bias: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The logit of every token, x (..., in) -> (...)."""
        return token_logit(x, self.weight, self.bias)


Gate = StaticGate | TokenGate
GATES: dict[str, type[StaticGate] | type[TokenGate] | None] = {
    "none": None,
    "static": StaticGate,
    "token": TokenGate,
}
