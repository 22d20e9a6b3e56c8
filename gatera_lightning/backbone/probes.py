"""Find out what a model does by trying it, rather than by looking its architecture up in a list."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from gatera_lightning.backbone.loading import context_length


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


def isolates_packed_sequences(model: PreTrainedModel) -> bool:
    """Return whether sequences packed into one row do not influence each other.

    A state that one token passes to the next, of a convolution or a recurrent layer, crosses the border of
    two sequences, so models that have one are rejected. All others are tried: two packed rows that differ
    only in their first sequence must give the same logits for the second one, and those must be the logits
    that the second sequence has on its own. Models that ignore ``position_ids`` fail.

    The first comparison is between equal shapes, so it is strict. Only a mixture of experts rounds
    differently there, because an expert gets other tokens to multiply. In the second one, kernels differ.
    """
    device = next(model.parameters()).device
    length = min(40, (context_length(model.config) or 80) // 2)
    second = [(2 * i + i // 7) % 7 + 1 for i in range(length)]
    positions = torch.arange(length, device=device).repeat(2).unsqueeze(0)

    def logits_after(first: list[int]) -> Tensor:
        ids = torch.tensor([first + second], device=device)
        return _double(model(input_ids=ids, attention_mask=None, position_ids=positions).logits[0, length:])

    with torch.no_grad(), eval_mode(model):  # dropout would make the logits differ too
        packed = logits_after([(3 * i) % 7 + 1 for i in range(length)])
        after_another = logits_after([(5 * i + 3) % 7 + 1 for i in range(length)])
        alone = _double(model(input_ids=torch.tensor([second], device=device)).logits[0])
    influence, difference = ((packed - other).abs().max() / alone.std() for other in (after_another, alone))
    most_influence, most_difference = packing_tolerances(model, device)
    isolated = float(influence) <= most_influence and float(difference) <= most_difference
    return isolated and caches_only_keys_and_values(model)


def packing_tolerances(model: nn.Module, device: torch.device) -> tuple[float, float]:
    """Return how far logits may differ by rounding, relative to their standard deviation.

    A 16-bit kernel with a mask differs from one without by a tenth of the standard deviation, attention to
    the other sequence by several times it. Accelerators may multiply float32 in TF32.
    """
    coarsest = max(
        (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()),
        key=lambda dtype: torch.finfo(dtype).eps,
    )
    if coarsest == torch.float64:
        return 1e-11, 1e-9
    if coarsest == torch.float32:
        return (1e-5, 1e-3) if device.type == "cpu" else (5e-3, 0.05)
    return 0.02, 0.5


def _double(logits: Tensor) -> Tensor:
    return logits.to("cpu", torch.float64)  # not every accelerator has float64


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
    # Tensors of inference mode, in which Lightning validates and tests, have no version.
    normal = torch.inference_mode(False)
    with normal, torch.no_grad(), eval_mode(model), replaced_forward(head, substitute):
        output = model(input_ids=ids).logits
    return len(returned_by_head) == 1 and output is returned_by_head[0] and output._version == 0


@torch.no_grad()
def reads_only_earlier_tokens(model: PreTrainedModel) -> bool:
    """Return whether a token's logits stay the same when a later token changes, as in a causal model."""
    ids = torch.tensor([[1, 2, 1, 2], [1, 2, 1, 1]], device=next(model.parameters()).device)
    with eval_mode(model):
        first, second = _double(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    influence = (first[:3] - second[:3]).abs().max() / first.std()
    return float(influence) <= packing_tolerances(model, ids.device)[0]


@torch.no_grad()
def skips_hidden_columns(model: PreTrainedModel) -> bool:
    """Return whether a column that the attention mask hides changes nothing, if no position counts it.

    Some models compute positions from columns and ignore those that they are given: MPT's ALiBi, BART.
    """
    device = next(model.parameters()).device
    with eval_mode(model):
        plain = _double(model(input_ids=torch.tensor([[1, 2, 2]], device=device)).logits)[0, -1]
        hidden = _double(
            model(
                input_ids=torch.tensor([[1, 2, 1, 2]], device=device),
                attention_mask=torch.tensor([[1, 1, 0, 1]], device=device),
                position_ids=torch.tensor([[0, 1, 2, 2]], device=device),
            ).logits
        )[0, -1]
    influence = (hidden - plain).abs().max() / plain.std()
    return float(influence) <= packing_tolerances(model, device)[0]


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
