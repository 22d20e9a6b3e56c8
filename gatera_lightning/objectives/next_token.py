"""Cross-entropy of the next token at supervised positions, and the forward pass that it needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.backbone.probes import has_plain_frozen_head, returns_head_output
from gatera_lightning.backbone.recomputation import recompute_elementwise
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch
from gatera_lightning.objectives.base import Objective, Term
from gatera_lightning.objectives.linear_cross_entropy import summed_loss_in_head


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy loss (nats per token), logged as ``train/task_loss``; runs the model's forward pass.

    The output head computes the loss itself, without storing logits, where :meth:`prepare` found that the
    model allows it.
    """

    def prepare(self, model: PreTrainedModel) -> None:
        """Try once whether the model returns just what its head computes; a collective if it is sharded."""
        if model not in _RETURNS_HEAD_OUTPUT:
            _RETURNS_HEAD_OUTPUT[model] = returns_head_output(model)

    def terms(self, model: PreTrainedModel, batch: Batch, gates: GateRecord) -> dict[str, Term]:
        """Run the model and compute the loss."""
        return {
            "task_loss": Term(summed_next_token_loss(model, batch), max(1, batch["step_supervised_tokens"]))
        }


_RETURNS_HEAD_OUTPUT: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""The answers of :meth:`NextToken.prepare`."""


@dataclass(frozen=True)
class SupervisedLogits:
    """Logits at the n positions that predict a supervised token."""

    logits: Tensor
    """(1, n, vocabulary), as the model returned them."""

    labels: Tensor
    """(n,), the token that follows each position."""

    positions: Tensor
    """(batch, tokens), True at the n positions."""


def supervised_logits(model: PreTrainedModel, batch: Batch) -> SupervisedLogits:
    """Run the model's forward pass with the output head applied at supervised positions only.

    Args:
        model: A causal language model, adapted or not.
        batch: ``input_ids``, ``labels`` and ``attention_mask`` (batch, tokens); packed sequences have
            ``position_ids`` too.
    """
    labels, positions = _shifted(batch)
    return SupervisedLogits(_logits(model, batch, positions), labels, positions)


def summed_next_token_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the model's forward pass and return ``Σ −log p(label)`` over its supervised tokens.

    Args:
        model: The adapted model. After :meth:`NextToken.prepare` its head computes the loss if it can.
        batch: As for :func:`supervised_logits`.
    """
    if not (_RETURNS_HEAD_OUTPUT.get(model, False) and has_plain_frozen_head(model)):
        found = supervised_logits(model, batch)
        return summed_cross_entropy(found.logits, found.labels)
    labels, positions = _shifted(batch)
    return summed_loss_in_head(model, labels, lambda: _logits(model, batch, positions))


def _shifted(batch: Batch) -> tuple[Tensor, Tensor]:
    """The supervised labels (n,), and the positions (batch, tokens) that predict them."""
    labels = shift_labels(batch["labels"])
    positions = labels != IGNORE_INDEX
    return labels[positions], positions


def _logits(model: PreTrainedModel, batch: Batch, positions: Tensor) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "position_ids" in batch:  # packed: without a mask, positions that restart at 0 separate the examples
        inputs |= {"attention_mask": None, "position_ids": batch["position_ids"]}
    with recompute_elementwise(), head_only_at(model, positions):
        return cast(Tensor, model(**inputs).logits)


def shift_labels(labels: Tensor) -> Tensor:
    """Move labels (batch, tokens) to the positions that predict them; the last position is ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def shift_mask(mask: Tensor) -> Tensor:
    """Move a mask over tokens (batch, tokens) to the positions that predict them."""
    return F.pad(mask[:, 1:], (0, 1), value=False)


@contextmanager
def head_only_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Apply the output head at some positions only: inside, the model returns logits (1, n, vocabulary).

    The selection happens inside the model's own forward pass, so that soft caps and scales that follow the
    head still apply. Most positions of instruction data are not supervised, and the head is the largest
    matmul of all.

    Args:
        model: A causal language model.
        positions: (batch, tokens), True at the n positions to compute.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args  # (batch, tokens, width)
        return hidden[positions].unsqueeze(0), *rest

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``Σ −log p(label)`` as a scalar in fp32 or wider; exactly 0 for n = 0.

    Args:
        logits: (1, n, vocabulary).
        labels: (n,).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.squeeze(0).to(wide), labels.to(logits.device), reduction="sum")
