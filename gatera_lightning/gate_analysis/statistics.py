"""Statistics of gates over many tokens, as a torchmetrics metric: kept on the device, summed over processes."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from gatera_lightning.objectives.next_token import gate_entropy

BINS = 50
CLOSED, OPEN = 0.1, 0.9
PHASES: tuple[Literal["prompt"], Literal["response"]] = ("prompt", "response")
STATISTICS = ("mean", "share_closed", "share_open", "entropy")
"""Of ``g``: its mean, the shares below 0.1 and from 0.9 on, and the mean of ``H(g)``, in nats."""


class GateStatistics(Metric):
    """Counts of ``g`` in 50 equal bins, and ``Σg``, ``ΣH(g)`` and ``Σg²``, for prompt and response and every module.

    Sums over steps and processes are exact for counts and within fp32 rounding for sums.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    bins: Tensor
    """(phases, modules, 50)"""
    sums: Tensor
    """(3, phases, modules): ``Σg``, ``ΣH``, ``Σg²``"""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.add_state(
            "bins", torch.zeros(len(PHASES), modules, BINS, dtype=torch.long), dist_reduce_fx="sum"
        )
        self.add_state("sums", torch.zeros(3, len(PHASES), modules), dist_reduce_fx="sum")

    @override
    def update(self, z: Tensor, real: Tensor, response: Tensor) -> None:
        """Add gate logits (modules, batch, tokens) where ``real`` (batch, tokens), apart where ``response`` (batch, tokens)."""
        z = torch.nan_to_num(z.detach().float())  # a diverged step is stopped by its loss, not by its picture
        g, entropy = torch.sigmoid(z), gate_entropy(z)
        index = (g * BINS).long().clamp_(max=BINS - 1)
        for phase, mask in enumerate((real & ~response, real & response)):
            weight = mask.to(g.dtype).expand_as(g)  # (modules, batch, tokens)
            self.bins[phase].scatter_add_(1, index.flatten(1), mask.long().expand_as(index).flatten(1))
            self.sums[0, phase] += (g * weight).sum((1, 2))
            self.sums[1, phase] += (entropy * weight).sum((1, 2))
            self.sums[2, phase] += (g * g * weight).sum((1, 2))

    @override
    def compute(self) -> tuple[Tensor, Tensor]:
        """Bins and sums on the CPU, over all processes."""
        return self.bins.cpu(), self.sums.cpu().double()


def statistics_of_counts(bins: Tensor, sums: Tensor) -> Tensor:
    """:data:`STATISTICS` from counts (…, 50) and sums (3, …), in this order: (…, 4); NaN where there are no tokens."""
    edge = round(CLOSED * BINS)
    parts = torch.stack([sums[0], bins[..., :edge].sum(-1), bins[..., -edge:].sum(-1), sums[1]], -1).double()
    return parts / bins.sum(-1, keepdim=True)


def statistics_of(gates: np.ndarray) -> dict[str, float | int | list[int]]:
    """Of gates (modules, tokens): tokens, mean, shares closed and open, and counts in 50 equal bins. Empty without tokens."""
    if not gates.size:
        return {"tokens": 0}
    counts = np.bincount(np.minimum((gates * np.float32(BINS)).astype(int), BINS - 1).ravel(), minlength=BINS)
    return {
        "tokens": int(gates.shape[1]),
        "mean": float(gates.mean(dtype=float)),
        "share_closed": float((gates < CLOSED).mean()),
        "share_open": float((gates >= OPEN).mean()),
        "bins": counts.tolist(),
    }
