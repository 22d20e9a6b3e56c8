"""Hard gates: a token gets the whole update or none, decided by a draw in training (as in GaDRA, 2026)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gates.base import Gate, GateConfig, GateValues, is_finite_number
from gatera_lightning.adapters.gates.straight_through import share_problem, straight_through
from gatera_lightning.adapters.kernels.gate_logit import token_logit
from gatera_lightning.errors import unknown_value

Reads = Literal["input", "outputs"]


class HardGate(Gate):
    """``γ ~ Bernoulli(σ(z))`` in training with the gradient of ``σ(z)``, ``γ = 1[σ(z) > ½]`` in evaluation.

    ``z = w·x + b``: a gate that reads the layer's input only.

    Args:
        in_features: Size of the layer's input.
        bias: Initial b.
        gradient_share: Share of the tokens from which the gradient of γ is estimated, without bias.
        dtype: Dtype of the parameters.
        device: Their device.
    """

    depends_on_token = True
    decides = True

    def __init__(
        self,
        in_features: int,
        *,
        bias: float,
        gradient_share: float = 1.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))
        self.gradient_share = gradient_share

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the logit of every token: (..., in) -> (...)."""
        return token_logit(x, self.weight, self.bias)

    def values(self, logit: Tensor) -> GateValues:
        """Draw 0 or 1 in training, decide in evaluation."""
        if not self.training:
            decided = _decided(logit, logit > 0)
            return GateValues(decided, rounded=decided)
        g = torch.sigmoid(logit)
        drawn = _decided(logit.detach(), torch.rand_like(g) < g)
        values, graded = straight_through(drawn, g, self.gradient_share)
        return GateValues(values, rounded=values, graded=graded)

    def linear_logit(self) -> tuple[Tensor, float] | None:
        """Return ``(w, b)``; None for a subclass, which may compute its logit differently."""
        return (self.weight.detach(), float(self.bias)) if type(self) is HardGate else None


def _decided(logit: Tensor, is_open: Tensor) -> Tensor:
    """Return 1 for open tokens and 0 for others; a NaN stays one, so that it reaches the loss."""
    return torch.where(logit.isnan(), logit, is_open.to(logit.dtype))


class DualHardGate(HardGate):
    """A hard gate that reads both outputs: ``z = w·W0 x + v·u(x) + b``, with w and v of size out.

    Args:
        out_features: Size of the layer's output.
        bias: Initial b.
        gradient_share: As for :class:`HardGate`.
        dtype: Dtype of the parameters.
        device: Their device.
    """

    needs_update = True

    def __init__(
        self,
        out_features: int,
        *,
        bias: float,
        gradient_share: float = 1.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(out_features, bias=bias, gradient_share=gradient_share, dtype=dtype, device=device)
        self.update_weight = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the logit of every token: both outputs (..., out) -> (...)."""
        assert base_out is not None  # because of needs_update
        assert update_out is not None
        no_bias = self.bias.new_zeros(1)
        of_update = token_logit(update_out, self.update_weight, no_bias)
        return token_logit(base_out, self.weight, self.bias) + of_update


@dataclass
class HardGateConfig(GateConfig):
    """A token gets the whole update or none: drawn with probability σ(z) in training, decided afterwards."""

    kind = "hard"
    formula = "1[σ(z) > 1/2], z = w·x + b; in training drawn with probability σ(z)"

    bias: float = 1.0
    """Initial logit b: 1 starts with 73 % of the tokens open."""

    reads: Reads = "input"
    """What z reads: the layer's input, which lets closed tokens skip the update, or both of its outputs, z =
    w·W0 x + v·u(x) + b, which needs the update of every token."""

    gradient_share: float = 1.0
    """The gate's gradient is estimated, without bias, from this random share of the tokens. With HiRA, each
    token of the share costs one large matmul."""

    sparsity_weight: float = 0.0
    """Weight of the mean of σ(z) in the loss, which closes gates; 0 turns it off."""

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> HardGate:
        """Create a :class:`HardGate`, which reads the input."""
        return HardGate(
            in_features, bias=self.bias, gradient_share=self.gradient_share, dtype=dtype, device=device
        )

    def build_for(self, base: nn.Linear, dtype: torch.dtype) -> HardGate:
        """Create a :class:`HardGate`, or a :class:`DualHardGate` if it reads both outputs."""
        device = base.weight.device
        if self.reads == "input":
            return self.build(base.in_features, dtype=dtype, device=device)
        return DualHardGate(
            base.out_features, bias=self.bias, gradient_share=self.gradient_share, dtype=dtype, device=device
        )

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        found = super().problems()
        if not is_finite_number(self.bias):
            found.append(f"adapter.gate.bias: {self.bias!r}; accepted: a finite number")
        if self.reads not in get_args(Reads):
            found.append(unknown_value("adapter.gate.reads", self.reads, get_args(Reads)))
        found += share_problem(self.gradient_share)
        return found + sparsity_problem(self.sparsity_weight)

    @property
    def saturates(self) -> bool:
        """Whether closed and open tokens are computed apart: if the gate reads the input only."""
        return self.reads == "input"


def sparsity_problem(weight: object) -> list[str]:
    """Return a message if a sparsity weight is not a number of at least 0; else an empty list."""
    if is_finite_number(weight) and weight >= 0:  # type: ignore[operator]
        return []
    return [f"adapter.gate.sparsity_weight: {weight!r}; accepted: a number of at least 0"]
