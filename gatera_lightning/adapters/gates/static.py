"""The static gate: one learned scalar per layer (static-gating ablation of GateRA, arXiv 2511.17582)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gates.base import Gate, GateValues
from gatera_lightning.adapters.gates.sigmoid import SigmoidGateConfig


class StaticGate(Gate):
    """``z = b``: one learned scalar per layer (static-gating ablation of GateRA, arXiv 2511.17582)."""

    depends_on_token = False

    def __init__(self, *, bias: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the bias, repeated for every token: (..., in) -> (...)."""
        # Not expanded: without gradients, a view of a parameter says that it requires one, which the hooks of
        # PyTorch's FLOP counter do not expect.
        return self.bias.repeat(x.shape[:-1])

    def values(self, logit: Tensor) -> GateValues:
        """Return ``σ(b)`` for every token, and once as a constant."""
        return GateValues(torch.sigmoid(logit), constant=self.constant_value())

    def constant_value(self) -> Tensor:
        """Return ``σ(b)``, (1,)."""
        return torch.sigmoid(self.bias)


@dataclass
class StaticGateConfig(SigmoidGateConfig):
    """One learned scalar per layer, the same for every token."""

    kind = "static"
    formula = "σ(b), one scalar per layer"

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> StaticGate:
        """Create a :class:`StaticGate`."""
        return StaticGate(bias=self.bias, dtype=dtype, device=device)
