"""The output head and the cross-entropy as one operation that never stores the logits of all positions.

A frozen head needs no gradient of its own. For one chunk of positions at a time, the forward pass computes
the logits, the loss and the gradient with respect to the hidden states, and stores only that gradient. No
matmul is computed twice.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.kernels.differentiation import first_order_only
from gatera_lightning.backbone.probes import replaced_forward

LOGITS_PER_CHUNK = 2**25
"""Number of logits in a chunk: in bf16 with their fp32 copy 200 MB, for any number of positions.

With a vocabulary of 128k that is 256 positions; with far fewer, a GPU takes longer to read the head's weight
than to multiply.
"""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return ``Σ −log softmax(W h + b)[label]`` with a gradient with respect to ``hidden`` only.

    Args:
        hidden: Hidden states (n, width).
        weight: The frozen head's weight (vocabulary, width).
        bias: Its bias (vocabulary,), or None.
        labels: (n,).

    Returns:
        A scalar in fp32 or wider; exactly 0 for n = 0.
    """
    loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


class _LinearCrossEntropy(torch.autograd.Function):
    """``dh = (softmax(W h + b) − onehot(label)) W``, computed in forward and saved in ``hidden``'s dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        dhidden = torch.empty_like(hidden)
        rows = max(1, LOGITS_PER_CHUNK // len(weight))
        for chunk, at, gradient in zip(
            hidden.split(rows), labels.split(rows), dhidden.split(rows), strict=True
        ):
            loss += _chunk_loss(chunk, weight, bias, at, gradient)
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        # In dloss's dtype: a GPU would cast dloss to bf16 to multiply a bf16 tensor, which scales every
        # gradient wrongly.
        return (dhidden.to(dloss.dtype) * dloss).to(dhidden.dtype), None, None, None


def _chunk_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dhidden: Tensor
) -> Tensor:
    """Summed loss of a chunk; its gradient goes to ``dhidden`` (rows, width). In place: logits are large."""
    at = labels.unsqueeze(1)  # (rows, 1)
    logits = F.linear(hidden, weight, bias)  # (rows, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits -= logits.amax(1, keepdim=True)
    label_logits = logits.gather(1, at)
    p = logits.exp_()
    total = p.sum(1, keepdim=True)
    p /= total
    p.scatter_(1, at, p.gather(1, at) - 1)
    torch.mm(p.to(hidden.dtype), weight, out=dhidden)
    return (total.log() - label_logits).sum()


def summed_loss_in_head(model: PreTrainedModel, labels: Tensor, forward: Callable[[], Tensor]) -> Tensor:
    """Run a forward pass whose output head computes the summed cross-entropy instead of logits.

    This happens inside the model's own forward pass, because only there does a sharded head have its full
    weight, and the loss leaves the model as its output, because sharded models prepare their backward pass
    from that.

    Args:
        model: A model whose output is what its head computes
            (:func:`~gatera_lightning.backbone.probes.returns_head_output`).
        labels: (n,), for the n positions that the head receives.
        forward: Calls ``model`` and returns ``logits`` of its output.

    Returns:
        The summed loss, a scalar in fp32 or wider.
    """
    head = model.get_output_embeddings()

    def loss(hidden: Tensor) -> Tensor:  # (1, n, width) -> (1, 1, 1)
        rows = hidden.flatten(0, 1)
        return linear_cross_entropy(rows, head.weight, head.bias, labels.to(rows.device)).view(1, 1, 1)

    with replaced_forward(head, loss):
        return forward().squeeze()
