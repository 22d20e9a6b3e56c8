"""The token gate of GateRA: one scalar per token (Ou et al., AAAI 2026, arXiv 2511.17582)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gates.base import Gate, GateValues, threshold_problems
from gatera_lightning.adapters.gates.sigmoid import SigmoidGateConfig
from gatera_lightning.adapters.gates.straight_through import share_problem, straight_through
from gatera_lightning.adapters.kernels.gate_logit import token_logit
from gatera_lightning.adapters.kernels.saturated_gates import hard_gates


class TokenGate(Gate):
    """``z = w·x + b``: one scalar per token, ``in + 1`` parameters per layer (GateRA, arXiv 2511.17582)."""

    depends_on_token = True

    def __init__(
        self,
        in_features: int,
        *,
        bias: float,
        thresholds: tuple[float, float] = (0.0, 1.0),
        gradient_share: float | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))
        self.gradient_share = gradient_share
        self.set_thresholds(*thresholds)

    def set_thresholds(self, skip_below: float, merge_above: float) -> None:
        """Set the values beyond which an update may treat this gate as 0 or 1 in training."""
        self._thresholds = skip_below, merge_above

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the logit of every token: (..., in) -> (...)."""
        return token_logit(x, self.weight, self.bias)

    def values(self, logit: Tensor) -> GateValues:
        """Return ``σ(z)``, and for a training step the values that thresholds round to 0 or 1.

        A rounded value has no gradient, or an estimate of that of ``σ(z)`` if ``gradient_share`` is set.
        """
        g = torch.sigmoid(logit)
        if self._thresholds == (0.0, 1.0) or not self.training or not torch.is_grad_enabled():
            return GateValues(g)
        rounded = hard_gates(g, *self._thresholds)
        if self.gradient_share is None:
            return GateValues(g, rounded)
        is_rounded = (rounded == 0) | (rounded == 1)
        values, graded = straight_through(rounded, g, self.gradient_share)
        return GateValues(g, torch.where(is_rounded, values, g), graded)

    def linear_logit(self) -> tuple[Tensor, float] | None:
        """Return ``(w, b)``; None for a subclass, which may compute its logit differently."""
        return (self.weight.detach(), float(self.bias)) if type(self) is TokenGate else None


@dataclass
class TokenGateConfig(SigmoidGateConfig):
    """One scalar per token, computed from the layer's input (GateRA)."""

    kind = "token"
    formula = "σ(w·x + b), one scalar per token"

    skip_below: float = 0.0
    """In training, treat gates below this as 0, at 2 large matmuls per token instead of 5. 0 skips none."""

    merge_above: float = 1.0
    """In training, treat gates above this as 1 and use the merged weight, at 3 large matmuls per token
    instead of 5. 1 merges none. In bfloat16, merging loses changes below about 0.4 % of a weight."""

    gradient_share: float | None = None
    """With thresholds, a gate that is treated as 0 or 1 gets a gradient from a random share of the tokens, so
    that it can leave 0 or 1 again; unbiased, at one large matmul for each token of the share. Null gives it
    no gradient."""

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> TokenGate:
        """Create a :class:`TokenGate`."""
        return TokenGate(
            in_features,
            bias=self.bias,
            thresholds=self.thresholds,
            gradient_share=self.gradient_share,
            dtype=dtype,
            device=device,
        )

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        found = [f"adapter.gate.{text}" for text in threshold_problems(self.skip_below, self.merge_above)]
        if self.gradient_share is not None:
            found += share_problem(self.gradient_share)
            if not found and not self.has_thresholds:
                found.append(
                    f"adapter.gate.gradient_share: {self.gradient_share!r}, without thresholds; accepted: "
                    "null, or a skip_below above 0 or a merge_above below 1"
                )
        return super().problems() + found

    @property
    def thresholds(self) -> tuple[float, float]:
        """Training treats gates below the first as 0, and above the second as 1."""
        return self.skip_below, self.merge_above
