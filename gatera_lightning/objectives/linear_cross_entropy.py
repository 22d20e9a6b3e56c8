"""The output head and the cross-entropy as one, so that a training step never holds the logits of all its targets.

A frozen head needs no gradient of its own: of each chunk of positions, the loss and its gradient by the hidden states are
computed while the chunk's logits are there, and only that gradient stays. No product is computed twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from gatera_lightning.backbone.loading import evaluating

LOGITS_AT_A_TIME = 2**25
"""Logits of a chunk: in bf16 and with their fp32 copy 200 MB, however many targets there are.

Of a vocabulary of 128 k that is 256 positions; with far fewer, a GPU takes longer to read the head's weight than to multiply.
"""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """``Σ −log softmax(W h + b)[target]`` in fp32 or wider, with a gradient by ``hidden`` only; exactly 0 for n = 0.

    Shapes: hidden (n, width), weight (vocabulary, width) and bias (vocabulary,) frozen, targets (n,).
    """
    return cast(Tensor, _LinearCrossEntropy.apply(hidden, weight, bias, targets))


class _LinearCrossEntropy(torch.autograd.Function):
    """``dh = (softmax(W h + b) − onehot(target)) W``, computed in forward and kept for backward in ``hidden``'s dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        dhidden = torch.empty_like(hidden)
        rows = max(1, LOGITS_AT_A_TIME // len(weight))
        for chunk, at, gradient in zip(
            hidden.split(rows), targets.split(rows), dhidden.split(rows), strict=True
        ):
            loss += _of_chunk(chunk, weight, bias, at, gradient)
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        # In dloss's dtype: a GPU would make it bf16 to multiply a bf16 tensor, and every gradient be off by the same factor.
        return (dhidden.to(dloss.dtype) * dloss).to(dhidden.dtype), None, None, None


def _of_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dhidden: Tensor
) -> Tensor:
    """The chunk's summed loss; its gradient is written to ``dhidden`` (rows, width). In place, since logits are large."""
    at = targets.unsqueeze(1)  # (rows, 1)
    logits = F.linear(hidden, weight, bias)  # (rows, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits -= logits.amax(1, keepdim=True)
    of_target = logits.gather(1, at)
    p = logits.exp_()
    total = p.sum(1, keepdim=True)
    p /= total
    p.scatter_(1, at, p.gather(1, at) - 1)
    torch.mm(p.to(hidden.dtype), weight, out=dhidden)
    return (total.log() - of_target).sum()


@contextmanager
def cross_entropy_in_head(model: PreTrainedModel, targets: Tensor) -> Iterator[None]:
    """Let the model return the summed cross-entropy (1, 1, 1) in place of logits; ``targets`` are of the head's positions (n,).

    Inside the model's own forward, since a sharded head's weight is whole only there. For a model that
    :func:`returns_what_its_head_does`.
    """

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets).view(1, 1, 1)

    head = model.get_output_embeddings()
    with _forward_of(head, loss):
        yield


@torch.no_grad()
def returns_what_its_head_does(model: PreTrainedModel) -> bool:
    """Whether the head is a plain frozen linear layer, and its output what the model returns: no soft cap, no scale after it.

    Tried, not looked up: what the head hands out must come back, the very tensor, and not written to. One forward of two
    tokens, which draws no random numbers; a collective where the model is sharded. On the meta device it tells the same.
    """
    head = model.get_output_embeddings()
    if (
        type(head) is not nn.Linear
        or "forward" in vars(head)
        or any(p.requires_grad for p in head.parameters())
    ):
        return False
    handed_out: list[Tensor] = []

    def hand_out(hidden: Tensor) -> Tensor:
        # In the loss's dtype: a model that makes its logits fp32 leaves an fp32 loss as it is.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        handed_out.append(hidden.new_empty(*hidden.shape[:-1], head.out_features, dtype=wide))
        return handed_out[-1]

    token = int(getattr(model.config, "pad_token_id", None) == 0)  # models warn of padding without a mask
    ids = torch.full((1, 2), token, device=next(model.parameters()).device)
    with evaluating(model), _forward_of(head, hand_out):
        returned = model(input_ids=ids).logits
    return len(handed_out) == 1 and returned is handed_out[0] and returned._version == 0


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module compute something else; its hooks still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own again
