"""Statistics of gate values: a torchmetrics metric, its groups of modules, and plain numpy summaries."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.errors import check_arguments
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.objectives.gate_entropy import gate_entropy

BINS = 50
CLOSED_BELOW, OPEN_FROM = 0.1, 0.9
PHASES: tuple[Literal["prompt"], Literal["response"]] = ("prompt", "response")
STATISTICS = ("mean", "share_closed", "share_open", "entropy")
"""The mean of ``g``, the shares of ``g < 0.1`` and of ``g ≥ 0.9``, and the mean of ``H(g)`` in nats."""


class GateStatistics(Metric):
    """Count gates in 50 equal bins and sum ``g``, ``H(g)`` and ``g²``, for each phase and module.

    The counts stay on the device. Over steps and ranks they add up exactly, and the sums up to fp32 rounding.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    bins: Tensor
    """(phases, modules, 50)"""
    sums: Tensor
    """(3, phases, modules): ``Σg``, ``ΣH(g)``, ``Σg²``"""

    def __init__(self, modules: int) -> None:
        """Start with empty counts.

        Args:
            modules: The number of gated modules.
        """
        check_arguments(GateStatistics.__init__, locals())
        super().__init__()
        self.add_state(
            "bins", torch.zeros(len(PHASES), modules, BINS, dtype=torch.long), dist_reduce_fx="sum"
        )
        self.add_state("sums", torch.zeros(3, len(PHASES), modules), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, mask: Tensor, response_mask: Tensor) -> None:
        """Add the gates of one batch.

        Args:
            logits: Gate logits (modules, batch, tokens).
            mask: (batch, tokens), True at the tokens to count.
            response_mask: (batch, tokens), True at response tokens.
        """
        z = torch.nan_to_num(logits.detach().float())  # a diverged step is reported by its loss, not here
        g, entropy = torch.sigmoid(z), gate_entropy(z)
        index = (g * BINS).long().clamp_(max=BINS - 1)
        for phase, in_phase in enumerate((mask & ~response_mask, mask & response_mask)):
            weight = in_phase.to(g.dtype).expand_as(g)  # (modules, batch, tokens)
            self.bins[phase].scatter_add_(1, index.flatten(1), in_phase.long().expand_as(index).flatten(1))
            self.sums[0, phase] += (g * weight).sum((1, 2))
            self.sums[1, phase] += (entropy * weight).sum((1, 2))
            self.sums[2, phase] += (g * g * weight).sum((1, 2))

    @override
    def compute(self) -> tuple[Tensor, Tensor]:
        """Return bins and sums over all ranks, on the CPU."""
        return self.bins.cpu(), self.sums.cpu().double()


def counted_tokens(batch: Batch) -> Tensor:
    """Return the mask (batch, tokens) of the tokens whose gates count: no padding, no dummy examples."""
    mask = batch["attention_mask"] > 0
    if "position_ids" not in batch:  # packed sequences contain no dummy examples
        mask &= (batch["example_ids"] >= 0).unsqueeze(1)
    return mask


def statistics_from_counts(bins: Tensor, sums: Tensor) -> Tensor:
    """Compute :data:`STATISTICS` from what :class:`GateStatistics` counted.

    Args:
        bins: (…, 50)
        sums: (3, …)

    Returns:
        (…, 4); NaN where there are no tokens.
    """
    edge = round(CLOSED_BELOW * BINS)
    parts = torch.stack([sums[0], bins[..., :edge].sum(-1), bins[..., -edge:].sum(-1), sums[1]], -1).double()
    return parts / bins.sum(-1, keepdim=True)


def share_skipped(bins: Tensor) -> Tensor:
    """Return the share of gates below ½, which gates that decide skip, from counts (…, 50): (…, 1)."""
    return bins[..., : BINS // 2].sum(-1, keepdim=True).double() / bins.sum(-1, keepdim=True)


def statistics_from_gates(gates: np.ndarray) -> dict[str, Any]:
    """Summarize gates (modules, tokens); only ``tokens`` is present if there are none.

    Returns:
        ``tokens``, ``mean``, ``share_closed``, ``share_open`` and ``bins`` (counts in 50 equal bins).
    """
    if not gates.size:
        return {"tokens": 0}
    counts = np.bincount(np.minimum((gates * np.float32(BINS)).astype(int), BINS - 1).ravel(), minlength=BINS)
    return {
        "tokens": int(gates.shape[1]),
        "mean": float(gates.mean(dtype=float)),
        "share_closed": float((gates < CLOSED_BELOW).mean()),
        "share_open": float((gates >= OPEN_FROM).mean()),
        "bins": counts.tolist(),
    }


def mean_by_layer(modules: Sequence[GatedModule], gates: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Average gates (modules, tokens) over the modules of each layer; returns layers and (layers, tokens)."""
    numbers = np.array([module.layer for module in modules])
    layers = sorted(set(numbers.tolist()))
    return layers, np.stack([gates[numbers == layer].mean(0, dtype=float) for layer in layers])


def module_groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Group gated modules: all of them, by projection type, by decoder layer, and each module alone.

    Args:
        names: Paths of the gated modules.

    Returns:
        The indices of the modules of each group, by the group's tag: ``gates``, ``gate_families/q_proj``,
        ``gate_layers/03``, ``gate_modules/<path>``.
    """
    modules = [GatedModule(name) for name in names]
    layers = gated_layers(names)
    width = max(2, len(str(max(layers, default=0))))  # so that tags sort in the order of the layers
    groups = {"gates": list(range(len(modules)))}
    for projection in dict.fromkeys(module.projection for module in modules):
        groups[f"gate_families/{projection}"] = [
            i for i, module in enumerate(modules) if module.projection == projection
        ]
    for layer in layers:
        groups[f"gate_layers/{layer:0{width}}"] = [
            i for i, module in enumerate(modules) if module.layer == layer
        ]
    return groups | {f"gate_modules/{name}": [i] for i, name in enumerate(names)}


def gated_layers(names: Sequence[str]) -> list[int]:
    """Return the decoder layers with at least one gate, sorted."""
    return sorted({GatedModule(name).layer for name in names} - {-1})


def sum_over_groups(groups: dict[str, list[int]], bins: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add the counts of the modules of each group; integers are exact up to 2^53.

    Args:
        groups: Indices of modules, from :func:`module_groups`.
        bins: (phases, modules, 50)
        sums: (3, phases, modules)

    Returns:
        Bins (phases, groups, 50) and sums (3, phases, groups), in float64.
    """
    member = torch.zeros(len(groups), bins.shape[1], dtype=torch.double)
    for row, modules in zip(member, groups.values(), strict=True):
        row[modules] = 1
    return member @ bins.double(), sums @ member.T
