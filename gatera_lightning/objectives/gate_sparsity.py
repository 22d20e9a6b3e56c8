"""The sparsity term of gates that decide, which closes them (TS-PEFT, arXiv 2511.16147)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.base import Objective, Term
from gatera_lightning.objectives.gate_entropy import stacked_logits


@dataclass(frozen=True)
class GateSparsity(Objective):
    """Mean openness over gated layers and non-padding tokens: ``λ · Σ σ(z) / (tokens · layers)``.

    Logged as ``train/gate_openness``, together with the share of tokens that a layer would skip in evaluation
    as ``train/gate_skipped``. Place it after the objective that runs the model; without gates it has no
    terms.
    """

    weight: float
    """λ; with 0 the openness is only logged."""

    def terms(self, model: PreTrainedModel, batch: Batch, gates: GateRecord) -> dict[str, Term]:
        """Compute both terms from the recorded gate logits.

        Raises:
            ValueError: If the model has gates, but none were recorded.
        """
        mask = batch["attention_mask"]  # (batch, tokens), 1 = not padding
        z = stacked_logits("GateSparsity", self.weight, model, mask, gates)
        if z is None:
            return {}
        count = max(1, batch["step_tokens"]) * len(z)
        openness = summed_gate_openness(z if self.weight else z.detach(), mask)
        skipped = ((z.detach() <= 0) * mask).sum().to(openness.dtype)
        return {
            "gate_openness": Term(openness, count, self.weight),
            "gate_skipped": Term(skipped, count, 0.0),
        }


def summed_gate_openness(z: Tensor, mask: Tensor) -> Tensor:
    """Sum ``σ(z)`` over layers and non-padding tokens.

    Args:
        z: Gate logits (layers, batch, tokens).
        mask: (batch, tokens), 1 for a non-padding token and 0 for padding.
    """
    return (torch.sigmoid(z) * mask).sum()
