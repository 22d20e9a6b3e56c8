"""Memory and FLOPs of one micro-batch, found by running it on the meta device.

Tensors have shapes but no data there. The model's own code, its adapter and the training objectives run as in
training, gradient checkpointing included. Every allocation is counted when it is made and when it is freed,
and every matmul by its FLOPs. Attention is assumed to be a fused kernel, which saves its inputs and its
output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.frozen_adapter import inject_frozen_adapter
from gatera_lightning.adapters.injection import inject_adapters
from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.adapters.packed_weight import stored_bytes
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.decoder_layers import decoder_layers
from gatera_lightning.backbone.loading import prepare_for_training
from gatera_lightning.backbone.quantization import quantize_linear_layers, stored_quantization
from gatera_lightning.cost_model.live_bytes import LiveBytes
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives import Objective, default_objectives, evaluate_objectives


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one forward pass."""

    sequences: int
    """Number of sequences; a packed sequence counts once."""

    length: int
    """Tokens of each sequence, padding included."""

    supervised_tokens: int
    """Supervised tokens of all sequences together."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together, padding included."""
        return self.sequences * self.length


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's parameters."""

    frozen: int
    """Of the backbone."""

    adapter: int
    """Of the adapter."""

    layers: tuple[int, ...]
    """Frozen bytes of each decoder layer, in order."""

    @property
    def root(self) -> int:
        """Frozen bytes outside the decoder layers: embeddings, norms, head."""
        return self.frozen - sum(self.layers)


@dataclass(frozen=True)
class StepCosts:
    """Costs of one micro-batch, forward and backward, with nothing sharded."""

    activations: int
    """Bytes alive between forward and backward, without logits."""

    logits: int
    """Bytes of logits and of what the loss computes from them; of a chunk, if the head computes the loss."""

    peak: int
    """Peak allocated bytes without weights, adapter and optimizer moments."""

    forward_flops: int
    """FLOPs of the forward pass; if the head computes the loss, of that loss's gradient too."""

    backward_flops: int
    """FLOPs of the backward pass, recomputation included."""


def build_on_meta(
    config: AutoConfig, backbone: BackboneConfig, adapter: AdapterConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build an adapted model on the meta device.

    Args:
        config: The model's Hugging Face configuration.
        backbone: How the model is run; its weights are not read.
        adapter: The adapter.
        dtype: Dtype of the frozen weights.

    Returns:
        The model in training mode, with an attention that has a fused kernel's shapes.

    Raises:
        ConfigError: If the adapter does not fit the model, or the model's code needs actual values.
    """
    with _needs_no_values(type(config).__name__.removesuffix("Config")), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_FUSED, trust_remote_code=backbone.trust_remote_code
        )
    storage = stored_quantization(config) or backbone.quantization
    if storage != "none":
        quantize_linear_layers(model, storage)
    if backbone.adapter is not None:
        inject_frozen_adapter(model, read_adapter_config(backbone.adapter)[0], digest="")
    inject_adapters(model, adapter)
    prepare_for_training(model, backbone)
    return cast(PreTrainedModel, model.train())


def model_sizes(model: PreTrainedModel) -> ModelSizes:
    """Return the bytes of a model's parameters."""
    own = {id(parameter) for parameter in adapter_parameters(model).values()}

    def frozen(module: nn.Module) -> int:
        return sum(stored_bytes(p) for p in module.parameters() if id(p) not in own)

    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in own)
    return ModelSizes(frozen(model), adapter, tuple(frozen(layer) for layer in decoder_layers(model)))


def step_costs(
    model: PreTrainedModel,
    batch: MicroBatch,
    *,
    recomputed: bool = False,
    objectives: Sequence[Objective] | None = None,
) -> StepCosts:
    """Run one micro-batch on the meta device and count its memory and FLOPs.

    Args:
        model: What :func:`build_on_meta` returns.
        batch: The shape of the micro-batch.
        recomputed: Whether decoder layers use gradient checkpointing.
        objectives: What is trained; default: :func:`~gatera_lightning.objectives.default_objectives`.

    Raises:
        ConfigError: If the model's or an objective's code needs actual values.
    """
    live = LiveBytes([*model.parameters(), *model.buffers()])
    activations = 0

    def mark_head(*_: Any) -> None:
        nonlocal activations
        activations = live.now
        live.reset_recent_peak()

    loss_of = _prepared_loss(model, batch, objectives)
    handle = model.get_output_embeddings().register_forward_pre_hook(mark_head)
    try:
        with _needs_no_values(type(model).__name__), live:
            loss = loss_of()
            logits = live.recent_peak - activations
            loss.backward()
    finally:
        handle.remove()
    model.zero_grad(set_to_none=True)
    # A second run for the FLOPs: the counter's own hooks would keep tensors alive.
    forward, backward = step_flops(model, batch, objectives=objectives)
    attention = _attention_flops(model, batch)
    return StepCosts(
        activations=activations,
        logits=logits,
        peak=live.peak,
        forward_flops=forward,
        # A fused backward recomputes the scores, one of the forward's two matmuls; a checkpointed layer
        # repeats both.
        backward_flops=backward + attention * (3 if recomputed else 1) // 2,
    )


def step_flops(
    model: PreTrainedModel, batch: MicroBatch, *, objectives: Sequence[Objective] | None = None
) -> tuple[int, int]:
    """Run one micro-batch on the meta device and count its FLOPs.

    Args:
        model: What :func:`build_on_meta` returns.
        batch: The shape of the micro-batch.
        objectives: As for :func:`step_costs`.

    Returns:
        FLOPs of the forward and of the backward pass, without the recomputation of attention scores.

    Raises:
        ConfigError: If the model's or an objective's code needs actual values.
    """
    forward, backward = (FlopCounterMode(display=False, custom_mapping=_GROUPED) for _ in range(2))
    loss_of = _prepared_loss(model, batch, objectives)
    with _needs_no_values(type(model).__name__):
        with forward:
            loss = loss_of()
        with backward:
            loss.backward()
        attention = _attention_flops(model, batch)
    model.zero_grad(set_to_none=True)
    return forward.get_total_flops() + attention, backward.get_total_flops() + 2 * attention


@contextmanager
def _needs_no_values(model: str) -> Iterator[None]:
    """Turn whatever a model's own code raises on the meta device into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ConfigError(
            f"backbone.id: the costs of {model} cannot be computed without its weights ({reason})"
        ) from error


def _prepared_loss(
    model: PreTrainedModel, batch: MicroBatch, objectives: Sequence[Objective] | None
) -> Callable[[], Tensor]:
    """The training loss of a micro-batch of these shapes, as a function that runs the model."""
    chosen = default_objectives(model) if objectives is None else objectives
    with _needs_no_values(type(model).__name__):
        for objective in chosen:
            objective.prepare(model)

    def loss_of() -> Tensor:
        # Fused attention needs no mask, and code that creates one for other kernels may look at its values.
        handle = model.register_forward_pre_hook(_drop_mask, with_kwargs=True)
        try:
            return evaluate_objectives(chosen, model, _meta_batch(batch)).loss
        finally:
            handle.remove()

    return loss_of


def _drop_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"attention_mask": None}


def _meta_batch(batch: MicroBatch) -> Batch:
    """A batch on the meta device; only its labels have values, because their number is a shape."""
    shape = (batch.sequences, batch.length)
    ids, mask = torch.zeros(2, *shape, dtype=torch.long, device="meta").unbind()
    labels = torch.full(shape, IGNORE_INDEX)
    # The first token of a sequence is never supervised.
    following = torch.zeros(batch.sequences, batch.length - 1, dtype=torch.bool)
    following.view(-1)[: batch.supervised_tokens] = True
    labels[:, 1:][following] = 0
    per_sequence = torch.zeros(batch.sequences, dtype=torch.long, device="meta")
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        response_mask=labels != IGNORE_INDEX,
        example_ids=per_sequence,
        answer_ids=per_sequence,
        gold_ids=per_sequence,
        answer_characters=per_sequence,
        all_candidates_present=False,
        step_supervised_tokens=batch.supervised_tokens,
        step_tokens=batch.tokens,
    )


class _FusedAttention(torch.autograd.Function):
    """The shapes of a fused kernel, which saves q, k, v, its output, and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """As Transformers calls attention: (batch, heads, tokens, width) to (batch, tokens, heads, width)."""
    out = _FusedAttention.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


_FUSED = "gatera_fused_shapes"
AttentionInterface.register(_FUSED, _fused)


def _grouped_flops(a: torch.Size, b: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs ``2 · n · in · out`` of tokens (n, in) through an expert (in, out) each, or of its gradient."""
    return 2 * a[0] * a[1] * b[-1]


_GROUPED = {torch.ops.aten._grouped_mm: _grouped_flops}
"""The experts of a mixture, which PyTorch's counter does not know."""


def _attention_flops(model: PreTrainedModel, batch: MicroBatch) -> int:
    """FLOPs of a forward pass, two matmuls over half of the scores: ``2 · 2 · T²/2 · heads · width``."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)  # a state-space model has none
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return int(2 * batch.length**2 * heads * width * batch.sequences * config.num_hidden_layers)
