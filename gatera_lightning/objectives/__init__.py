"""Training objectives, and the loss that they add up to."""

from gatera_lightning.objectives.base import (
    Mean,
    MicroBatchLoss,
    Objective,
    StepOutput,
    Term,
    evaluate_objectives,
)
from gatera_lightning.objectives.gate_entropy import GateEntropy
from gatera_lightning.objectives.gate_sparsity import GateSparsity
from gatera_lightning.objectives.mask_embeddings import MaskEmbeddings
from gatera_lightning.objectives.next_token import NextToken, SupervisedLogits, supervised_logits
from gatera_lightning.objectives.random_ids import RandomIds
from gatera_lightning.objectives.self_draft import SelfDraft
from gatera_lightning.objectives.training_loss import default_objectives, training_loss

__all__ = [
    "GateEntropy",
    "GateSparsity",
    "MaskEmbeddings",
    "Mean",
    "MicroBatchLoss",
    "NextToken",
    "Objective",
    "RandomIds",
    "SelfDraft",
    "StepOutput",
    "SupervisedLogits",
    "Term",
    "default_objectives",
    "evaluate_objectives",
    "supervised_logits",
    "training_loss",
]
