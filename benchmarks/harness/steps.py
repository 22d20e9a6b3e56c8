"""The optimizer steps that are compared: this library's methods, PEFT's, and the frozen backbone's.

All train random weights of SmolLM2-135M's shape, or of a smaller or wider one, with AdamW and clipping at 1.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.allocator import Forward, Step, peak_allocated_bytes, saved_bytes
from benchmarks.harness.interleaving import Round, run_interleaved
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.stepped_trainer import SteppedTrainer
from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    GateRAModule,
    OptimizerConfig,
    adapter_parameters,
    inject_adapters,
    training_loss,
)
from gatera_lightning.adapters.gates import HardGateConfig, TokenGateConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.compilation import compile_layers
from gatera_lightning.backbone.probes import returns_head_output
from gatera_lightning.backbone.quantization import quantize_linear_layers
from gatera_lightning.backbone.recomputation import recompute_elementwise
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch
from gatera_lightning.objectives import next_token
from gatera_lightning.objectives.linear_cross_entropy import summed_loss_in_head
from gatera_lightning.objectives.next_token import head_only_at, shift_labels, summed_cross_entropy

VOCABULARY = 49152
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LR, MAX_NORM = 1e-4, 1.0

ADAPTERS = {
    "gatera": AdapterConfig(),
    "gatera_saved": AdapterConfig(),
    "gatera_70_closed": AdapterConfig(gate=TokenGateConfig(skip_below=0.1)),
    "gatera_saturated": AdapterConfig(gate=TokenGateConfig(skip_below=0.1, merge_above=0.9)),
    "hard_half_open": AdapterConfig(gate=HardGateConfig(bias=0.0, gradient_share=1 / 8)),
    "ts_peft": AdapterConfig(update="lora", gate="threshold"),
    "hira": AdapterConfig(gate="none"),
    "hira_static": AdapterConfig(gate="static"),
    "abba": AdapterConfig(update="abba", gate="none"),
    "lora": AdapterConfig(update="lora", gate="none"),
    "gated_lora": AdapterConfig(update="lora"),
    "dora": AdapterConfig(update="dora", gate="none"),
}
COMPILED = {f"{method}_compiled": ADAPTERS[method] for method in ("gatera", "lora")}
LOOPS = ("plain_loop", "module")
"""The same step as ``gatera``, as users run it: in a loop of their own, and by a Trainer."""

PEFT = ("peft_lora", "peft_lora_targets", "peft_dora", "peft_hira")
METHODS = ("frozen", *ADAPTERS, *LOOPS, *COMPILED, *PEFT)


@dataclass(frozen=True)
class StepSettings:
    """What all contenders share."""

    dtype: str = "bfloat16"
    layers: int = 30
    width: int = 576
    rank: int = 32
    examples: int = 4
    tokens: int = 160
    """Of each example."""
    supervised: int = 8
    """The last tokens of each example."""
    quantization: str = "none"
    """How the frozen weights are stored; only this library's methods can have it."""


@dataclass(frozen=True)
class Contender:
    """A model and its optimizer step."""

    step: Step
    loss: Forward
    """The forward pass of the step."""
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    """None if nothing is trained."""


class PlainStep:
    """Forward and backward pass, clipping, and the optimizer's step.

    Args:
        loss: Computes the loss.
        parameters: What is trained.
        optimizer: None if nothing is trained.
    """

    def __init__(
        self, loss: Forward, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._loss, self._parameters, self._optimizer = loss, parameters, optimizer

    def __call__(self, inside: AbstractContextManager[Any] | None = None) -> None:
        """Take the step."""
        with nullcontext() if inside is None else inside:
            self._loss().backward()
            if self._optimizer is not None:
                nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)


# --- what is timed and counted ---


def timed_step(method: str, settings: StepSettings) -> Round:
    """Return an optimizer step; its decoder layers are compiled if the method says so."""
    contender = build_contender(method, settings)
    if method in COMPILED:
        compile_layers(contender.model)

    def run_once() -> None:
        contender.step()

    return run_once


def counted_step(method: str, settings: StepSettings) -> Round:
    """Count the FLOPs and bytes of a step, and return them as figures, with its first loss.

    This needs a process of its own: counting would enlarge the peak memory of a step that is timed.
    """
    contender = build_contender(method, settings)
    loss = float(contender.loss().detach())
    # Before compiling, which does not change the matmuls but hides them from the counter.
    flops = count_flops(contender.step)
    if method in COMPILED:
        compile_layers(contender.model)
    contender.step()  # creates the optimizer's moments, and compiles
    counted = {
        "loss": loss,
        "flops": float(flops),
        "saved_bytes": float(saved_bytes(contender.loss)),
        "allocated_bytes": float(peak_allocated_bytes(contender.step, contender.model, contender.optimizer)),
    }
    return lambda: counted


def count_flops(step: Step) -> int:
    """Return the FLOPs of a step's matmuls."""
    counter = FlopCounterMode(display=False)
    step(counter)
    return int(counter.get_total_flops())


def count_each(contenders: Mapping[str, tuple[str, StepSettings]]) -> dict[str, dict[str, float]]:
    """Return what :func:`counted_step` counts of each contender, one after another."""
    return {
        name: run_interleaved({name: (counted_step, setting)}, rounds=1, warmup=0)[name].figures[0]
        for name, setting in contenders.items()
    }


# --- the contenders ---


def build_contender(method: str, settings: StepSettings) -> Contender:
    """Build one of :data:`METHODS`; nothing is compiled yet."""
    if method == "module":
        return _module(settings)
    batch = random_batch(settings.examples, settings.tokens, settings.supervised)
    if method in PEFT:
        model: nn.Module = random_backbone(settings)
        loss = _peft_loss(model, method, settings.rank, batch)
    elif method == "frozen":
        model = random_backbone(settings)
        loss = _frozen_loss(model, batch)
    else:
        config = (ADAPTERS | COMPILED).get(method, ADAPTERS["gatera"])
        model = adapted_backbone(settings, config)
        if config.gate.has_thresholds:
            set_gates(model, batch["input_ids"], sharpness=1.0 if method == "gatera_70_closed" else 1e3)
        if config.gate.kind == "threshold":
            set_threshold_gates(model, batch["input_ids"], closed=0.5)
        loss = _training_loss(model, batch, method)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR) if parameters else None
    return Contender(PlainStep(loss, parameters, optimizer), loss, model, optimizer)


def random_backbone(settings: StepSettings) -> LlamaForCausalLM:
    """Return random weights of SmolLM2-135M's shape, with the depth and width of the settings."""
    torch.manual_seed(0)
    width = settings.width
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(DEVICE, getattr(torch, settings.dtype)).train()


def adapted_backbone(settings: StepSettings, config: AdapterConfig) -> LlamaForCausalLM:
    """Return :func:`random_backbone` with an adapter whose B is not zero, so that A has gradients."""
    model = random_backbone(settings)
    if settings.quantization != "none":
        quantize_linear_layers(model, settings.quantization)
    inject_adapters(model, replace(config, rank=settings.rank))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("update.b"):
                parameter.normal_(std=1e-3)
    return model


def random_batch(examples: int, tokens: int, supervised: int) -> Batch:
    """Return a batch of random tokens (examples, tokens); the last ones of each example are supervised."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (examples, tokens), generator=generator).to(DEVICE)
    labels = ids.clone()
    labels[:, :-supervised] = IGNORE_INDEX
    found: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "response_mask": labels != IGNORE_INDEX,
        "example_ids": torch.arange(examples, device=DEVICE),
        "step_tokens": ids.numel(),
        "step_supervised_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
    }
    return cast(Batch, found)


@torch.no_grad()
def set_gates(
    model: nn.Module, ids: Tensor, closed: float = 0.7, *, sharpness: float, threshold: float = 0.1
) -> None:
    """Set the gates so that a share of the tokens is below the threshold, layer by layer in one forward.

    Args:
        model: A model with token gates.
        ids: The tokens (batch, tokens).
        closed: The share of tokens with a gate below the threshold.
        sharpness: Norm of the gates' weights; if it is large, nearly all other gates are above 0.9.
        threshold: A gate value.
    """

    def set_bias(layer: AdaptedLinear, args: tuple[Tensor]) -> None:
        layer.gate.weight.normal_().mul_(sharpness / layer.gate.weight.norm())
        layer.gate.bias.zero_()
        z = layer.gate(args[0])
        layer.gate.bias.sub_(z.quantile(closed)).add_(math.log(threshold / (1 - threshold)))

    _in_one_forward(model, ids, set_bias)


@torch.no_grad()
def set_threshold_gates(model: nn.Module, ids: Tensor, closed: float) -> None:
    """Give every layer an update, and the threshold τ below which a share of the tokens is."""

    def set_threshold(layer: AdaptedLinear, args: tuple[Tensor]) -> None:
        layer.update.b.normal_().mul_(0.01)
        sizes = (layer.update.delta(args[0], layer.base), layer.base(args[0]))
        update_norm, base_norm = (y.norm(dim=-1, dtype=torch.float32) for y in sizes)
        layer.gate.threshold.copy_((update_norm / base_norm).quantile(closed))

    _in_one_forward(model, ids, set_threshold)


def _in_one_forward(
    model: nn.Module, ids: Tensor, hook: Callable[[AdaptedLinear, tuple[Tensor]], None]
) -> None:
    """Call ``hook`` with every adapted layer and its input, one after the other in one forward pass."""
    handles = [layer.register_forward_pre_hook(hook) for layer in adapted_linears(model).values()]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()


def _training_loss(model: LlamaForCausalLM, batch: Batch, method: str) -> Forward:
    if method == "plain_loop":  # no totals of the step, which users' batches do not have
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return lambda: training_loss(model, inputs)
    if method == "gatera_saved":

        def loss_without_recomputation() -> Tensor:
            with mock.patch.object(next_token, "recompute_elementwise", nullcontext):
                return training_loss(model, batch)

        return loss_without_recomputation
    return lambda: training_loss(model, batch)


def _module(settings: StepSettings) -> Contender:
    config = ADAPTERS["gatera"]

    class RandomModule(GateRAModule):
        """GateRAModule with a random backbone in place of one that is loaded."""

        def configure_model(self) -> None:
            if self.model is None:
                self.model = adapted_backbone(settings, config)

    module = RandomModule(
        backbone=BackboneConfig(id="random", dtype=settings.dtype),
        adapter=config,
        optimizer=OptimizerConfig(lr=LR, schedule="constant", warmup_steps=0),
    )
    batch = random_batch(settings.examples, settings.tokens, settings.supervised)
    step = SteppedTrainer(module, batch, gradient_clip_val=MAX_NORM)
    optimizer = step.trainer.optimizers[0]
    return Contender(step, lambda: module.training_step(batch, 0)["loss"], module.model, optimizer)


def _peft_loss(model: nn.Module, method: str, rank: int, batch: Batch) -> Forward:
    from peft import HiraConfig, LoraConfig, get_peft_model

    config: Any = HiraConfig(r=rank, target_modules=TARGET_MODULES)
    if method != "peft_hira":
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGET_MODULES, use_dora=method == "peft_dora"
        )
    wrapped = get_peft_model(cast(Any, model), config)  # in place
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if method != "peft_lora_targets":
        return lambda: wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss
    shifted = shift_labels(labels)
    positions = shifted != IGNORE_INDEX

    def loss_at_supervised_positions() -> Tensor:
        with head_only_at(cast(Any, model), positions):
            logits = wrapped(input_ids=ids, attention_mask=mask).logits
            return summed_cross_entropy(logits, shifted[positions]) / positions.sum()

    return loss_at_supervised_positions


def _frozen_loss(model: Any, batch: Batch) -> Forward:
    model.requires_grad_(False)
    assert returns_head_output(model)
    shifted = shift_labels(batch["labels"])
    positions = shifted != IGNORE_INDEX
    labels = shifted[positions]

    def loss() -> Tensor:
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        with recompute_elementwise(), head_only_at(model, positions):
            total = summed_loss_in_head(
                model,
                labels,
                lambda: model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits,
            )
        return total / len(labels)

    return loss
