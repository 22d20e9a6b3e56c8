"""What is measured of a model: the loss of every row, accuracy, and the values of the gates."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness.machine import DEVICE
from benchmarks.quality.families import Rows
from gatera_lightning import prepared_for_inference, record_gates
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules import Batch
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.evaluation.candidate_scoring import candidate_log_likelihoods
from gatera_lightning.evaluation.likelihood_ranking import ranked_questions
from gatera_lightning.objectives.next_token import supervised_logits

ROWS_AT_ONCE = 16

SATURATED = 0.1
"""A gate below this counts as closed, and above one minus this as open."""


@dataclass(frozen=True)
class RowLosses:
    """The cross-entropy of the correct answer of each row."""

    sums: list[float]
    """Nats, summed over the answer's tokens; rounded to four decimals."""

    tokens: list[int]
    """Number of these tokens."""

    correct: str = ""
    """For rows with candidates: 1 if the correct one has the highest likelihood per token, else 0."""

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return sum(self.sums) / sum(self.tokens)

    def first(self, rows: int) -> "RowLosses":
        """Return the losses of the first rows."""
        return RowLosses(self.sums[:rows], self.tokens[:rows], self.correct[:rows])


def on_device(batch: Batch) -> Batch:
    """Return the batch with its tensors on the device."""
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return moved  # type: ignore[return-value]


@torch.no_grad()
def row_losses(
    model: PreTrainedModel, rows: Rows, *, candidates: bool = False, with_end: bool = True
) -> RowLosses:
    """Measure the loss of every row.

    Args:
        model: The model, in evaluation mode.
        rows: The rows.
        candidates: Whether to compare the correct answer with the others as well.
        with_end: Whether the token that ends an answer counts; it always does with candidates. Training on
            any family lowers its loss in all of them, which would hide what is forgotten.
    """
    sums = [0.0] * len(rows.indices)
    tokens = [0] * len(rows.indices)
    correct = ["0"] * len(rows.indices)
    torch.manual_seed(0)  # for gates that draw
    with prepared_for_inference(model):
        for positions in rows.by_length(ROWS_AT_ONCE):
            batch = on_device(rows.padded(positions, candidates=candidates))
            if not candidates:
                if not with_end:
                    ends = batch["attention_mask"].sum(1, keepdim=True) - 1  # (rows, 1)
                    batch["labels"].scatter_(1, ends, IGNORE_INDEX)
                found = supervised_logits(model, batch)
                losses = F.cross_entropy(found.logits[0].float(), found.labels, reduction="none")  # (n,)
                row = found.positions.nonzero()[:, 0]  # (n,)
                total = losses.new_zeros(len(positions)).index_add_(0, row, losses).tolist()
                counts = row.bincount(minlength=len(positions)).tolist()
            else:
                questions = ranked_questions(batch, *candidate_log_likelihoods(model, batch))
                total = [-question.log_likelihoods[question.gold] for question in questions]
                counts = [question.tokens[question.gold] for question in questions]
                for position, question in zip(positions, questions, strict=True):
                    correct[position] = str(int(question.choice("per_token") == question.gold))
            for position, loss, count in zip(positions, total, counts, strict=True):
                sums[position], tokens[position] = round(loss, 4), count
    return RowLosses(sums, tokens, "".join(correct) if candidates else "")


@torch.no_grad()
def gate_statistics(model: PreTrainedModel, rows: Rows) -> dict[str, float] | None:
    """Return how open the gates are, over layers and tokens of the rows; None without gates.

    ``mean`` is the mean value, ``closed`` and ``open`` the shares near 0 and 1. A gate that decides has the
    values 0 and 1 only. ``tokens_std`` is the standard deviation over the tokens of a layer, averaged over
    layers, and ``layers_std`` that of the layers' means.
    """
    gated = [layer.gate for layer in adapted_linears(model).values() if layer.gate is not None]
    if not gated:
        return None
    torch.manual_seed(0)
    batch = on_device(rows.packed(list(range(len(rows.indices)))))
    with record_gates(model) as record:
        supervised_logits(model, batch)
    logits = record.stacked(batch["attention_mask"])
    assert logits is not None
    values = (logits > 0).float() if gated[0].decides else torch.sigmoid(logits)
    by_layer = values.flatten(1)  # (layers, tokens)
    return {
        "mean": round(float(by_layer.mean()), 4),
        "closed": round(float((by_layer < SATURATED).float().mean()), 4),
        "open": round(float((by_layer > 1 - SATURATED).float().mean()), 4),
        "tokens_std": round(float(by_layer.std(1).mean()), 4),
        "layers_std": round(float(by_layer.mean(1).std()), 4),
    }
