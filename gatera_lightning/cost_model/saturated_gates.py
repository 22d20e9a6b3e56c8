"""FLOPs that saturated gates save a training step: they depend on the tokens, which the meta device lacks."""

from dataclasses import dataclass

import torch
from torch import nn

from gatera_lightning.adapters.gates import HardGateConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears


@dataclass(frozen=True)
class GateShares:
    """Shares of the tokens by their gates; all others have the matmuls of a soft gate."""

    closed: float
    """Tokens with gates of 0."""

    opened: float
    """Tokens with gates of 1."""

    graded: float = 0.0
    """Saturated tokens whose gates get a gradient."""


def saved_flops(model: nn.Module, tokens: int, shares: GateShares, *, recomputed: bool = False) -> int:
    """Return how many FLOPs less a micro-batch takes than with soft gates, forward and backward.

    Of the 5 large matmuls of a token, ``2 · in · out`` FLOPs each, a closed token saves 3 and an open one 2,
    and one more each if the forward pass runs twice. An open token saves them only where the merged weight is
    accurate: in 16 bits, with stochastic rounding. A gradient of a saturated gate costs one.

    Args:
        model: A model with an adapter, which may be on the meta device.
        tokens: Of the micro-batch.
        shares: Shares of the tokens, of all layers together.
        recomputed: Whether decoder layers use gradient checkpointing.
    """
    once_more = 1 if recomputed else 0
    return sum(
        round(
            2
            * layer.weight.numel()
            * tokens
            * (
                shares.closed * (3 + once_more)
                + (shares.opened * (2 + once_more) if _merges(layer) else 0)
                - shares.graded
            )
        )
        for layer in adapted_linears(model).values()
        if _separates(layer)
    )


def half_open(model: nn.Module) -> GateShares | None:
    """Return the shares of hard gates that are open for half of the tokens; None if no layer has them."""
    configs = [layer.config.gate for layer in adapted_linears(model).values() if _separates(layer)]
    hard = next((gate for gate in configs if isinstance(gate, HardGateConfig)), None)
    return None if hard is None else GateShares(0.5, 0.5, hard.gradient_share)


def _separates(layer: AdaptedLinear) -> bool:
    """Return whether a training step computes closed and open tokens of this layer apart."""
    return layer.update.uses_gate_thresholds and layer.config.gate.saturates and layer.config.dropout == 0


def _merges(layer: AdaptedLinear) -> bool:
    dtype = layer.weight.dtype
    return dtype.itemsize >= 4 or (layer.config.stochastic_rounding and dtype == torch.bfloat16)
