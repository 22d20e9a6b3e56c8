"""Controls for the claim that the choice of tokens matters, built on the project's public contracts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning import Gate, TokenGateConfig, Update, register_update
from gatera_lightning.adapters.gates import GateValues, TokenGate
from gatera_lightning.adapters.kernels.hadamard import add_gated_hadamard
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.updates import UPDATES


class ShuffledTokenGate(TokenGate):
    """A token gate whose values go to other tokens of the same batch, drawn in every forward pass.

    It learns how many tokens are open and how far, like the token gate, but cannot choose which. After
    :func:`shuffle_without_padding`, no value comes from padding.
    """

    _mask: Tensor | None = None

    def begin_pass(self, mask: Tensor | None) -> None:
        """Take the mask of the forward pass that begins; None if nothing is padding.

        Args:
            mask: (batch, cached and new tokens), 1 = not padding.
        """
        self._mask = mask

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the logits of the tokens in random order: (..., in) -> (...)."""
        logit = super().forward(x)
        if self._mask is None:
            is_token = torch.ones_like(logit, dtype=torch.bool)
        else:
            is_token = self._mask[:, -x.shape[1] :].bool()  # (batch, tokens)
        values = logit[is_token]
        return logit.masked_scatter(is_token, values[torch.randperm(len(values), device=x.device)])


def shuffle_without_padding(model: PreTrainedModel) -> None:
    """Tell the model's shuffled gates in every forward pass which tokens are padding."""
    gates = [layer.gate for layer in adapted_linears(model).values()]
    shuffled = [gate for gate in gates if isinstance(gate, ShuffledTokenGate)]

    def begin_pass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for gate in shuffled:
            gate.begin_pass(kwargs.get("attention_mask"))

    if shuffled:
        model.register_forward_pre_hook(begin_pass, with_kwargs=True)


@dataclass
class ShuffledTokenGateConfig(TokenGateConfig):
    """The token gate with its values shuffled among the tokens of a batch."""

    kind = "shuffled_token"
    formula = "σ(w·x' + b) of another token x' of the batch"

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> TokenGate:
        """Create a :class:`ShuffledTokenGate`."""
        return ShuffledTokenGate(in_features, bias=self.bias, dtype=dtype, device=device)


class RandomGate(Gate):
    """``z = b + ε`` with a learned b per layer, and ε ~ N(0, 1) drawn for every token."""

    depends_on_token = True

    def __init__(self, *, bias: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), bias, dtype=dtype, device=device))

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return the bias with noise: (..., in) -> (...)."""
        return self.bias + torch.randn(x.shape[:-1], dtype=self.bias.dtype, device=x.device)

    def values(self, logit: Tensor) -> GateValues:
        """Return ``σ(z)``."""
        return GateValues(torch.sigmoid(logit))


@dataclass
class RandomGateConfig(TokenGateConfig):
    """A learned budget per layer, given to random tokens."""

    kind = "random"
    formula = "σ(b + ε), ε ~ N(0, 1)"

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Create a :class:`RandomGate`."""
        return RandomGate(bias=self.bias, dtype=dtype, device=device)


class RandomMatrixHiRA(Update):
    """``u(x) = (R ⊙ BA) x`` with a fixed random R of W0's standard deviation in place of W0."""

    name = "hira_random_matrix"
    formula = "(R ⊙ B A) x, R random"
    has_scale = False

    matrix: Tensor
    """R, (out, in)."""

    def __init__(self, base: nn.Linear, **settings: Any) -> None:
        super().__init__(base, **settings)
        weight = base.weight
        drawn = torch.randn(weight.shape, generator=settings.get("generator"), dtype=weight.dtype)
        self.register_buffer("matrix", drawn.to(weight.device) * weight.std(), persistent=False)

    def delta(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Compute ``(R ⊙ BA) x``: (..., in) -> (..., out)."""
        zero = x.new_zeros(*x.shape[:-1], base.out_features)
        return add_gated_hadamard(zero, x, self.matrix, *self.factors(), None)

    def forward(self, x: Tensor, base: nn.Linear, gate: GateValues | None, dropout: nn.Module) -> Tensor:
        """Compute the output of the adapted layer: (..., in) -> (..., out)."""
        values = None if gate is None else gate.values
        return add_gated_hadamard(base(x), dropout(x), self.matrix, *self.factors(), values)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return ``R ⊙ BA``, (out, in)."""
        a, b = self.factors()
        return self.matrix.to(a.dtype) * (b @ a)


@contextmanager
def controls_registered() -> Iterator[None]:
    """Inside the ``with`` block, updates of controls have names, as the library's own have."""
    register_update(RandomMatrixHiRA)
    try:
        yield
    finally:
        del UPDATES[RandomMatrixHiRA.name]
