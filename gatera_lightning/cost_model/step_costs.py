"""What a training step costs: a whole step carried out on the meta device, where tensors have shapes and no memory.

The model's own code runs, adapters, checkpointing and all; every allocation is counted when it is made and when it is given
back, every product by its operations. Attention is taken to be a fused kernel, which keeps its inputs and output.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gate_recording import record_gates
from gatera_lightning.adapters.injection import inject_adapters
from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.decoder_layers import decoder_layers
from gatera_lightning.backbone.loading import prepare_for_training
from gatera_lightning.backbone.probes import returns_head_output
from gatera_lightning.backbone.recomputation import recompute_elementwise
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives.linear_cross_entropy import cross_entropy_in_head
from gatera_lightning.objectives.next_token import summed_cross_entropy, summed_gate_entropy


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one forward: rows, tokens of each (padding included), and tokens of all of them that carry loss."""

    rows: int
    tokens: int
    targets: int


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's tensors."""

    frozen: int
    adapter: int
    layers: tuple[int, ...]
    """Frozen bytes of each decoder layer, in order."""

    @property
    def root(self) -> int:
        """Frozen bytes outside the decoder layers: embeddings, norms, head."""
        return self.frozen - sum(self.layers)


@dataclass(frozen=True)
class StepCosts:
    """One micro-batch, forward and backward, with nothing sharded."""

    activations: int
    """Bytes alive between forward and backward, logits left out."""

    logits: int
    """Bytes of logits and of what the loss makes of them; of a chunk, where the head computes the loss."""

    peak: int
    """Bytes of everything but weights, adapter and moments at the worst moment."""

    forward_flops: int
    """Of a head that computes the loss, the gradient too."""

    backward_flops: int


def build_on_meta(
    config: AutoConfig, backbone: BackboneConfig, adapter: AdapterConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The adapted model without memory. Raises ConfigError as injecting does, and for a model whose code needs real numbers."""
    with _said_of(type(config).__name__.removesuffix("Config")), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_FUSED, trust_remote_code=backbone.trust_remote_code
        )
    inject_adapters(model, adapter)
    prepare_for_training(model, backbone)
    return model.train()


def model_sizes(model: PreTrainedModel) -> ModelSizes:
    """What a model's parameters take."""
    own = {id(parameter) for parameter in adapter_parameters(model).values()}

    def frozen(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in own)

    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in own)
    return ModelSizes(frozen(model), adapter, tuple(frozen(layer) for layer in decoder_layers(model)))


def step_costs(model: PreTrainedModel, batch: MicroBatch, *, recomputed: bool = False) -> StepCosts:
    """Carry out one micro-batch on the meta device; ``recomputed`` says that layers are checkpointed.

    Raises ConfigError for a model whose code needs real numbers.
    """
    live = LiveBytes([*model.parameters(), *model.buffers()])
    marks: dict[str, int] = {}

    def at_head() -> None:
        marks["head"] = live.now
        live.recent = live.now

    with _said_of(type(model).__name__):
        in_head = returns_head_output(model)
        with live:
            loss = _loss(model, batch, at_head, in_head)
            marks["loss"] = live.recent
            loss.backward()
    model.zero_grad(set_to_none=True)
    # Again for the operations: the counter's own hooks would keep tensors alive that are otherwise given back.
    forward, backward = step_flops(model, batch)
    attention = _attention_flops(model, batch)
    return StepCosts(
        activations=marks["head"],
        logits=marks["loss"] - marks["head"],
        peak=live.peak,
        forward_flops=forward,
        # A fused backward computes the scores anew, one product of forward's two; a checkpointed layer runs forward again.
        backward_flops=backward + attention * (3 if recomputed else 1) // 2,
    )


def step_flops(model: PreTrainedModel, batch: MicroBatch) -> tuple[int, int]:
    """Operations of one micro-batch's forward and backward, on the meta device, scores of attention not computed anew.

    Raises ConfigError for a model whose code needs real numbers.
    """
    forward, backward = (FlopCounterMode(display=False, custom_mapping=_GROUPED) for _ in range(2))
    with _said_of(type(model).__name__):
        in_head = returns_head_output(model)
        with forward:
            loss = _loss(model, batch, lambda: None, in_head)
        with backward:
            loss.backward()
        attention = _attention_flops(model, batch)
    model.zero_grad(set_to_none=True)
    return forward.get_total_flops() + attention, backward.get_total_flops() + 2 * attention


@contextmanager
def _said_of(model: str) -> Iterator[None]:
    """Whatever a model's own code raises where tensors have no numbers, and it may be anything, as a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ConfigError(
            f"backbone.id: {model} cannot be carried out without its numbers ({reason})"
        ) from error


def _loss(model: PreTrainedModel, batch: MicroBatch, at_head: Callable[[], None], in_head: bool) -> Tensor:
    """GateRAModule's loss of a micro-batch of shapes, in the head or from its logits.

    ``at_head`` is called when the decoder layers have run.
    """
    with torch.device("meta"):
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
        targets = torch.zeros(batch.targets, dtype=torch.long)

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        at_head()
        return args[0].flatten(0, 1)[: batch.targets].unsqueeze(0), *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with (
            recompute_elementwise(),
            record_gates(model) as gates,
            cross_entropy_in_head(model, targets) if in_head else nullcontext(),
        ):
            out = model(input_ids=ids, attention_mask=None).logits
    finally:
        handle.remove()
    loss = out.squeeze() if in_head else summed_cross_entropy(out, targets)
    z = gates.stacked(ids)
    return loss if z is None else loss + summed_gate_entropy(z, ids)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as something holds them; those of ``known`` are left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.recent = 0  # recent: the peak since somebody set it
        # By address: a storage on the meta device has no data pointer to tell it by, and several Python objects.
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += self._sizes[key]
                    self.peak, self.recent = max(self.peak, self.now), max(self.recent, self.now)
                    weakref.finalize(storage, self._given_back, key)
        return out

    def _given_back(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _FusedAttention(torch.autograd.Function):
    """A fused attention kernel's shapes: it keeps q, k, v, its output and one number a row and head."""

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
    """As Transformers asks for attention: (batch, heads, tokens, width) to (batch, tokens, heads, width)."""
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


_FUSED = "gatera_fused_shapes"
AttentionInterface.register(_FUSED, _fused)


def _grouped_flops(a: torch.Size, b: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of rows (n, in) through an expert each, (experts, in, out), or of the gradient of those experts: ``2 · n · in · out``."""
    return 2 * a[0] * a[1] * b[-1]


_GROUPED = {
    torch.ops.aten._grouped_mm: _grouped_flops
}  # a mixture's experts, which PyTorch's counter does not know


def _attention_flops(model: PreTrainedModel, batch: MicroBatch) -> int:
    """Of one forward, both products over the half of the square that is not masked: ``2 · 2 · T²/2 · heads · width`` a row."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)  # a state-space model has none
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return 2 * batch.tokens**2 * heads * width * batch.rows * config.num_hidden_layers
