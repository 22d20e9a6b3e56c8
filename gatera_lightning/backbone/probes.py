"""Find out what a model does by trying it, rather than by looking its architecture up in a list."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def isolates_packed_sequences(model: PreTrainedModel) -> bool:
    """Return whether sequences packed into one row do not influence each other.

    Two packed sequences, each with positions from 0, go through the model without an attention mask. The
    logits of the second must not depend on the first, and must be those that the second sequence has on its
    own. Models with a recurrent state fail, and so do models that ignore ``position_ids``.

    Rounding in bf16 changes logits by a tenth of their standard deviation, attention to the other sequence by
    several times it. The threshold is half of it.
    """
    device = next(model.parameters()).device
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 3, 1, 2, 5, 6, 7]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device).expand(2, -1)
    with eval_mode(model):  # dropout would make the logits differ too
        packed = model(input_ids=rows, attention_mask=None, position_ids=positions).logits[:, 4:].float()
        alone = model(input_ids=rows[:1, 4:]).logits[0].float()
    threshold = 0.5 * float(alone.std())
    return all(float((logits - alone).abs().max()) <= threshold for logits in packed)


def has_plain_frozen_head(model: PreTrainedModel) -> bool:
    """Return whether the output head is an ordinary frozen ``nn.Linear`` that nobody has modified."""
    head = model.get_output_embeddings()
    frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    return frozen and "forward" not in vars(head)


@torch.no_grad()
def returns_head_output(model: PreTrainedModel) -> bool:
    """Return whether the model returns exactly what its plain frozen head computes: no soft cap, no scale.

    The tensor that the head returns must come back unmodified. The trial is one forward pass of two tokens,
    which draws no random numbers. It is a collective if the model is sharded, and works on the meta device.
    """
    if not has_plain_frozen_head(model):
        return False
    head = model.get_output_embeddings()
    returned_by_head: list[Tensor] = []

    def substitute(hidden: Tensor) -> Tensor:
        # In the loss's dtype: a model that casts its logits to fp32 leaves an fp32 loss as it is.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        returned_by_head.append(hidden.new_empty(*hidden.shape[:-1], head.out_features, dtype=wide))
        return returned_by_head[-1]

    token = int(getattr(model.config, "pad_token_id", None) == 0)  # models warn about padding without a mask
    ids = torch.full((1, 2), token, device=next(model.parameters()).device)
    with eval_mode(model), replaced_forward(head, substitute):
        output = model(input_ids=ids).logits
    return len(returned_by_head) == 1 and output is returned_by_head[0] and output._version == 0


def caches_only_keys_and_values(model: PreTrainedModel) -> bool:
    """Return whether the cache of a prompt holds keys and values only, which several answers can share.

    A convolution's or a recurrent layer's state cannot be shared, because reading an answer changes it.
    """
    layers = DynamicCache(config=model.config).layers
    keys_and_values = all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in layers
    )
    return keys_and_values and not model._is_stateful  # Transformers asks the same before it crops a cache


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute ``forward`` instead of its own; its hooks still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # uncovers the method of the class
