"""GateRA's loss, ``L = L_task + λ · L_ent``, normalised so that it means the same however a step is cut up.

One optimizer step is one large batch: however many micro-batches and ranks share its rows, its loss is

    ΣCE / (target tokens of the step)  +  λ · ΣH / (real tokens of the step · gated layers).

A mean over each micro-batch, averaged afterwards, would weight a token by how few neighbours it has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.datamodules.batch import IGNORE_INDEX


def gate_entropy(z: Tensor) -> Tensor:
    """``H(σ(z)) = −g log g − (1−g) log(1−g)`` in nats, elementwise, from the logit.

    Written with |z|, ``softplus(−|z|) + |z|·σ(−|z|)``: the form in z subtracts two large numbers for z ≫ 0.
    """
    distance = z.abs()
    return F.softplus(-distance) + distance * torch.sigmoid(-distance)


def next_token_labels(labels: Tensor) -> Tensor:
    """Labels moved to the position that predicts them: (batch, tokens), the last column ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def next_token_mask(mask: Tensor) -> Tensor:
    """A mask over tokens (batch, tokens) moved to the positions that predict them."""
    return F.pad(mask[:, 1:], (0, 1), value=False)


@contextmanager
def target_positions_only(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Let the output head see only the positions in ``keep`` (batch, tokens); logits become (1, kept, vocabulary).

    A pre-hook inside the model's own forward, so that what a model does to its logits afterwards (soft caps, scales)
    still happens. In instruction tuning most positions carry no loss, and the head is the widest product of all.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args  # (batch, tokens, width)
        return hidden[keep].unsqueeze(0), *rest

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``Σ −log p(target)`` in fp32 or wider; logits (1, n, vocabulary), targets (n,); exactly 0 for n = 0."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.squeeze(0).to(wide), targets, reduction="sum")


def summed_gate_entropy(z: Tensor, mask: Tensor) -> Tensor:
    """``Σ H`` over gated layers and real tokens; z (layers, batch, tokens), mask (batch, tokens), 1 = real."""
    return (gate_entropy(z) * mask).sum()
