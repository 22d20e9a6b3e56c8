"""Compute once, before generation, what does not change while no parameter is trained.

The exact mode caches what each update can reuse, such as HiRA's ``W0 ⊙ BA``. The fast mode caches the merged
weight ``W1 = W0 + ΔW``: decoding one token takes the time to read the weights, and a token with a saturated
gate reads only one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gatera_lightning.adapters.gates import Gate, threshold_problems
from gatera_lightning.adapters.kernels.autocast import autocast_disabled
from gatera_lightning.adapters.kernels.saturated_gates import hard_gates, tokens_by_gate
from gatera_lightning.adapters.layer import AdaptedLinear, GateListener
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.rank_space import RankSpacePath
from gatera_lightning.adapters.unchanged_parameters import UnchangedParameters
from gatera_lightning.adapters.updates.base import require_no_grad
from gatera_lightning.errors import checks_arguments

FEW_TOKENS = 32
"""Up to this many tokens, sorting them costs more than it saves, because reading the weights dominates."""


@checks_arguments
@contextmanager
def prepared_for_inference(
    model: nn.Module, *, skip_below: float = 0.0, merge_above: float = 1.0
) -> Iterator[None]:
    """Inside the ``with`` block, forward passes reuse cached products.

    Without thresholds the output is bit-identical. With thresholds, a token with ``g < skip_below`` reads
    only ``W0``, one with ``g > merge_above`` reads only the merged weight ``W1``, and others interpolate
    between both outputs by g. A layer whose gate does not depend on the token reads only the merged weight,
    and LoRA behind a threshold gate multiplies by B only for the tokens that keep their update.
    The output is then off by at most ``max(skip_below, 1 − merge_above) · |u(x)|`` plus the rounding of the
    merged weight.

    The cache takes as much memory as the adapted weights (without thresholds, HiRA's weights only). Layers
    with sharded weights, with hooks (also those added inside the block) or with a forward of their own are
    left as they are. If the adapter's
    parameters change inside the block, the next forward pass raises.

    Args:
        model: A model with an adapter.
        skip_below: Gate values below this count as 0; 0 is exact.
        merge_above: Gate values above this count as 1; 1 is exact.

    Raises:
        ValueError: If a threshold is out of range.
        RuntimeError: If a forward pass inside the block runs with gradients, or after a parameter changed.
    """
    if problems := threshold_problems(skip_below, merge_above):
        raise ValueError(f"prepared_for_inference: {'; '.join(problems)}")
    layers = [
        layer
        for layer in adapted_linears(model).values()
        if not isinstance(layer.base.weight, DTensor)
        and has_plain_forward(layer.base)
        and layer.inference_path is None
        and not layer.update.is_prepared
    ]
    try:
        for layer in layers:
            has_values_between = layer.gate is None or not layer.gate.selects_tokens
            if not (has_values_between and (skip_below > 0 or merge_above < 1)):
                layer.update.prepare(layer.base)
            elif RankSpacePath.fits(layer):
                layer.set_inference_path(RankSpacePath(layer))
            else:
                layer.set_inference_path(TwoWeightPath(layer, skip_below, merge_above))
        yield
    finally:
        for layer in layers:
            layer.set_inference_path(None)
            layer.update.release()


def prepared_bytes(model: nn.Module, *, with_thresholds: bool) -> int:
    """Return the size in bytes of what :func:`prepared_for_inference` caches for an unsharded model.

    Args:
        model: A model with an adapter; it may be on the meta device.
        with_thresholds: Whether the gate has thresholds.
    """
    return sum(
        (0 if RankSpacePath.fits(layer) else layer.base.weight.nbytes)
        if with_thresholds
        else layer.update.inference_constant_bytes(layer.base.weight)
        for layer in adapted_linears(model).values()
    )


class TwoWeightPath:
    """Computes a layer's output from two weights; a token with a saturated gate reads only one of them.

    Args:
        layer: The adapted layer.
        skip_below: Gate values below this count as 0, and the token reads ``W0``.
        merge_above: Gate values above this count as 1, and the token reads ``W1 = W0 + ΔW``.
    """

    @torch.no_grad()
    def __init__(self, layer: AdaptedLinear, skip_below: float, merge_above: float) -> None:
        self.frozen_weight, self.bias = layer.base.weight, layer.base.bias
        self.unchanged = UnchangedParameters(layer)
        self.skip_below, self.merge_above = skip_below, merge_above
        self.skip_below_logit, self.merge_above_logit = _logit(skip_below), _logit(merge_above)
        self.token_gate = layer.gate if layer.gate is not None and layer.gate.depends_on_token else None
        if self.token_gate is not None and self.token_gate.decides:  # 1 where the logit is above 0
            self.skip_below_logit, self.merge_above_logit = math.nextafter(0, 1), 0.0
        self.constant_gate = layer.gate if self.token_gate is None else None
        self.update_output = partial(layer.update.delta, base=layer.base)
        self.linear_logit = None if self.token_gate is None else self.token_gate.linear_logit()
        delta = layer.update.delta_weight(self.frozen_weight)  # (out, in)
        if self.constant_gate is not None:
            delta = delta * self.constant_gate.constant_value()
        self.merged_weight = (self.frozen_weight.to(delta.dtype) + delta).to(self.frozen_weight.dtype)

    def __call__(self, x: Tensor, listener: GateListener | None) -> Tensor:
        """Compute the layer's output; synchronizes with the device once to read the gates.

        Args:
            x: Input, (..., in).
            listener: Receives the gate's logits (...).

        Returns:
            The output, (..., out), in the backbone's dtype.
        """
        require_no_grad()
        self.unchanged.check()
        if torch.is_autocast_enabled(self.frozen_weight.device.type):
            with autocast_disabled(x):
                return self(x, listener)
        # A call without effect costs 2 us in every layer.
        rows = x if x.dtype == self.frozen_weight.dtype else x.to(self.frozen_weight.dtype)
        if self.token_gate is None:
            if listener is not None and self.constant_gate is not None:
                listener(self.constant_gate(x))
            return self._merged(rows)
        if listener is None and self.linear_logit is not None and x.numel() == x.shape[-1]:
            # Calling the gate would take a twentieth of the time to decode a token.
            weight, bias = self.linear_logit
            row = x if x.dtype == weight.dtype else x.to(weight.dtype)
            return self._few_tokens(rows, torch.dot(row.reshape(-1), weight).item() + bias)
        if self.token_gate.needs_update:
            return self._update_first(x, rows, self.token_gate, listener)
        logit = self.token_gate(x)
        if listener is not None:
            listener(logit)
        if self.linear_logit is not None and logit.numel() <= FEW_TOKENS:
            return self._few_tokens(rows, *logit.flatten().tolist())
        hard = hard_gates(self.token_gate.values(logit).values, self.skip_below, self.merge_above)
        y = self._sorted_by_gate(rows.flatten(0, -2), hard.flatten())  # (tokens, out)
        return y.view(*logit.shape, y.shape[-1])

    def _few_tokens(self, x: Tensor, *logits: float) -> Tensor:
        """Compare the gates in Python: for a few tokens, launching a kernel takes as long as running it."""
        if all(z < self.skip_below_logit for z in logits):
            return self._frozen(x)
        if all(z > self.merge_above_logit for z in logits):
            return self._merged(x)
        g = x.new_tensor([self._hard_gate(z) for z in logits])
        return self._mixed(x, g.view(x.shape[:-1]))

    def _hard_gate(self, z: float) -> float:
        if z < self.skip_below_logit:
            return 0.0
        return 1.0 if z > self.merge_above_logit else 0.5 + 0.5 * math.tanh(z / 2)

    def _sorted_by_gate(self, x: Tensor, hard: Tensor) -> Tensor:
        """Let saturated tokens read one weight: x (tokens, in), hard gates (tokens,) -> (tokens, out)."""
        tokens = tokens_by_gate(hard)
        if tokens is None:
            return self._mixed(x, hard)
        order, inverse, closed, not_open = tokens
        rows, g = x.index_select(0, order), hard.index_select(0, order)
        between = self._mixed(rows[closed:not_open], g[closed:not_open])
        y = torch.cat([self._frozen(rows[:closed]), between, self._merged(rows[not_open:])])
        return y.index_select(0, inverse)

    def _update_first(self, x: Tensor, rows: Tensor, gate: Gate, listener: GateListener | None) -> Tensor:
        """Compute both outputs first, because the gate reads them.

        It reads the update's own output: the difference of both outputs is mostly rounding in 16 bits.
        """
        base_out = F.linear(rows, self.frozen_weight)  # (..., out)
        frozen = base_out if self.bias is None else base_out + self.bias
        merged = self._merged(rows)
        logit = gate(x, base_out, self.update_output(x))
        if listener is not None:
            listener(logit)
        hard = hard_gates(gate.values(logit).values, self.skip_below, self.merge_above)
        return torch.lerp(frozen, merged, hard.unsqueeze(-1).to(frozen.dtype))

    def _mixed(self, x: Tensor, g: Tensor) -> Tensor:
        """Interpolate between both outputs: x (..., in), g (...) -> (..., out)."""
        return torch.lerp(self._frozen(x), self._merged(x), g.unsqueeze(-1).to(x.dtype))

    def _frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.frozen_weight, self.bias)

    def _merged(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged_weight, self.bias)


def _logit(gate: float) -> float:
    """Return z with ``σ(z) = gate``, which is infinite at 0 and 1."""
    return math.copysign(math.inf, gate - 0.5) if gate in (0, 1) else math.log(gate / (1 - gate))
