"""The entropy term of GateRA's loss, which pushes gates towards 0 or 1 (Ou et al., arXiv 2511.17582)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.base import Objective, Term


@dataclass(frozen=True)
class GateEntropy(Objective):
    """Mean entropy of the gates over gated layers and non-padding tokens: ``λ · Σ H(g) / (tokens · layers)``.

    Logged as ``train/gate_entropy``, together with the mean gate as ``train/gate_mean``. Place it after the
    objective that runs the model; without gates it has no terms.
    """

    weight: float
    """λ; with 0 the entropy is only logged."""

    def terms(self, model: PreTrainedModel, batch: Batch, gates: GateRecord) -> dict[str, Term]:
        """Compute both terms from the recorded gate logits.

        Raises:
            ValueError: If the model has gates, but none were recorded.
        """
        mask = batch["attention_mask"]  # (batch, tokens), 1 = not padding
        z = stacked_logits("GateEntropy", self.weight, model, mask, gates)
        if z is None:
            return {}
        count = max(1, batch["step_tokens"]) * len(z)
        entropy = summed_gate_entropy(z if self.weight else z.detach(), mask)
        gate_sum = (torch.sigmoid(z.detach()) * mask).sum()
        return {"gate_entropy": Term(entropy, count, self.weight), "gate_mean": Term(gate_sum, count, 0.0)}


def stacked_logits(
    name: str, weight: float, model: PreTrainedModel, mask: Tensor, gates: GateRecord
) -> Tensor | None:
    """Return the recorded gate logits (layers, batch, tokens) for a term of the gates; None without gates.

    Args:
        name: Name of the objective, for the error message.
        weight: Weight of its term.
        model: The adapted model.
        mask: Mask of the batch, (batch, tokens).
        gates: What was recorded.

    Raises:
        ValueError: If the term has a weight and the model has gates, but none were recorded.
    """
    z = gates.stacked(mask)
    if z is None and weight and any(layer.gate is not None for layer in adapted_linears(model).values()):
        raise ValueError(f"{name}: no gates were recorded; place it after the objective that runs the model")
    return z


def gate_entropy(z: Tensor) -> Tensor:
    """Entropy of gates ``g = σ(z)`` in nats, elementwise: ``H = −g log g − (1−g) log(1−g)``.

    Computed as ``softplus(−|z|) + |z|·σ(−|z|)``: the same formula in z subtracts two large numbers for z ≫ 0.

    Args:
        z: Gate logits of any shape.
    """
    distance = z.abs()
    return F.softplus(-distance) + distance * torch.sigmoid(-distance)


def summed_gate_entropy(z: Tensor, mask: Tensor) -> Tensor:
    """Sum the gate entropy over layers and non-padding tokens.

    Args:
        z: Gate logits (layers, batch, tokens).
        mask: (batch, tokens), 1 for a non-padding token and 0 for padding.
    """
    return (gate_entropy(z) * mask).sum()
