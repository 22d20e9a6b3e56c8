"""What does not change while nothing is trained, computed once: a token of decoding then needs no ``B A``.

Exact or fast. Exact keeps HiRA's ``W0 ⊙ BA`` and DoRA's row norms. Fast keeps the merged weight ``W1 = W0 + ΔW``: decoding one
token is reading weights, and a token whose gate is decided reads one of the two.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gatera_lightning.adapters.gates import TokenGate
from gatera_lightning.adapters.injection import adapted_linears
from gatera_lightning.adapters.kernels.hadamard import in_own_dtypes, without_gradients
from gatera_lightning.adapters.kernels.saturated_gates import hard_gates, tokens_by_gate
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.updates.hira import HiRA
from gatera_lightning.adapters.updates.lora import LoRA

FEW = 32
"""Tokens up to which sorting them costs more than it saves: reading a weight takes longer than multiplying by it."""


@contextmanager
def prepared_for_inference(
    model: nn.Module, *, skip_below: float = 0.0, merge_above: float = 1.0
) -> Iterator[None]:
    """Inside the ``with`` block, forwards reuse what updates make of their factors: the same numbers, bit for bit.

    With thresholds of a gate (0 and 1 leave it exact), a token with ``g < skip_below`` takes ``W0``, one with
    ``g > merge_above`` takes ``W1``, others ``W0 x + g (W1 x − W0 x)``; without a gate of its own, every token takes the merged
    weight. The output is off by at most ``max(skip_below, 1 − merge_above) · |u(x)|`` and what merging rounds.

    Costs the memory of the adapted weights once more (exact: HiRA's only). Layers whose weights are sharded are left as they
    are, since what is kept of them would not be. Factors must not change inside; a forward with gradients raises RuntimeError.
    """
    fast = skip_below > 0 or merge_above < 1
    layers = [
        layer for layer in adapted_linears(model).values() if not isinstance(layer.base.weight, DTensor)
    ]
    prepared = [
        layer
        for layer in layers
        if layer.routed is None and (isinstance(layer.update, LoRA) or layer.update.kept is None)
    ]
    try:
        for layer in prepared:
            if fast:
                layer.routed = RoutedLinear(layer, skip_below, merge_above)
            elif not isinstance(layer.update, LoRA):
                layer.update.kept = layer.update.constant(layer.base.weight)
        yield
    finally:
        for layer in prepared:
            layer.routed = None
            if not isinstance(layer.update, LoRA):
                layer.update.kept = None


def prepared_bytes(model: nn.Module, *, fast: bool) -> int:
    """What :func:`prepared_for_inference` keeps of a model that is not sharded, DoRA's row norms left out."""
    layers = adapted_linears(model).values()
    return sum(layer.base.weight.nbytes for layer in layers if fast or isinstance(layer.update, HiRA))


class RoutedLinear:
    """An adapted layer as two weights, of which a token with a decided gate reads one."""

    @torch.no_grad()
    def __init__(self, layer: AdaptedLinear, skip_below: float, merge_above: float) -> None:
        self.weight, self.bias = layer.base.weight, layer.base.bias
        self.skip_below, self.merge_above = skip_below, merge_above
        self.closed_below, self.open_above = _logit(skip_below), _logit(merge_above)
        delta = layer.update.delta_weight(self.weight)  # (out, in)
        self.gate = layer.gate if layer.gate is not None and layer.gate.depends_on_token else None
        if layer.gate is not None and self.gate is None:
            delta = delta * torch.sigmoid(layer.gate.bias)
        self.linear_gate: tuple[Tensor, float] | None = None
        if type(self.gate) is TokenGate:  # a kind derived from it may compute otherwise
            self.linear_gate = self.gate.weight.detach(), float(self.gate.bias)
        self.merged = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)

    def __call__(self, x: Tensor, z: Tensor | None) -> Tensor:
        """x (..., in), z (...) the gates' logits if they were computed already -> (..., out).

        Waits for the device once, to learn the gates.
        """
        without_gradients(self.merged)
        if torch.is_autocast_enabled(self.weight.device.type):
            with in_own_dtypes(x):
                return self(x, z)
        rows = (
            x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        )  # a call for nothing is 2 us of every layer
        if self.gate is None:
            return self._opened(rows)
        if z is None and self.linear_gate is not None and x.numel() == x.shape[-1]:
            weight, bias = self.linear_gate  # calling the gate would take a twentieth of decoding a token
            row = x if x.dtype == weight.dtype else x.to(weight.dtype)
            return self._of_few(rows, torch.dot(row.reshape(-1), weight).item() + bias)
        z = self.gate(x) if z is None else z
        if z.numel() <= FEW:
            return self._of_few(rows, *z.flatten().tolist())
        hard = hard_gates(torch.sigmoid(z), self.skip_below, self.merge_above)
        return self._by_gate(rows.flatten(0, -2), hard.flatten()).unflatten(0, z.shape)

    def _of_few(self, x: Tensor, *logits: float) -> Tensor:
        """Decided without a kernel: decoding has one token or a few, and starting a kernel takes as long as they do."""
        if all(z < self.closed_below for z in logits):
            return self._closed(x)
        if all(z > self.open_above for z in logits):
            return self._opened(x)
        hard = [
            0.0 if z < self.closed_below else 1.0 if z > self.open_above else 0.5 + 0.5 * math.tanh(z / 2)
            for z in logits
        ]
        return self._between(x, x.new_tensor(hard).view(x.shape[:-1]))

    def _by_gate(self, x: Tensor, hard: Tensor) -> Tensor:
        """x (tokens, in), hard gates (tokens,) -> (tokens, out)."""
        tokens = tokens_by_gate(hard)
        if tokens is None:
            return self._between(x, hard)
        order, back, closed, frozen = tokens
        rows, g = x.index_select(0, order), hard.index_select(0, order)
        between = self._between(rows[closed:frozen], g[closed:frozen])
        return torch.cat([self._closed(rows[:closed]), between, self._opened(rows[frozen:])]).index_select(
            0, back
        )

    def _between(self, x: Tensor, g: Tensor) -> Tensor:
        """x (..., in), g (...) -> (..., out)."""
        return torch.lerp(self._closed(x), self._opened(x), g.unsqueeze(-1).to(x.dtype))

    def _closed(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _opened(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged, self.bias)


def _logit(gate: float) -> float:
    """``z`` of ``σ(z) = gate``, at 0 and 1 too."""
    return math.copysign(math.inf, gate - 0.5) if gate in (0, 1) else math.log(gate / (1 - gate))
