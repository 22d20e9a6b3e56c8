"""Predicted costs against PyTorch's own allocator in a real step, and against sums by hand."""

import pytest
import torch
from packed_layers import ALL_STORAGES
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError, inject_adapters
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.backbone.loading import prepare_for_training
from gatera_lightning.backbone.quantization import quantize_linear_layers
from gatera_lightning.cost_model.step_costs import (
    MicroBatch,
    build_on_meta,
    model_sizes,
    step_costs,
    step_flops,
)
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.objectives import MaskEmbeddings, NextToken, Objective, SelfDraft, training_loss

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
WIDE = SIZES | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA = LlamaConfig(vocab_size=512, **SIZES)
BATCH = MicroBatch(sequences=8, length=64, supervised_tokens=96)


def allocated_peak(step):
    """The most bytes that PyTorch's allocator had handed out during ``step()``."""
    step()  # allocates what is allocated once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def real_step(model, batch):
    """One micro-batch of these shapes with real tensors; gradients are freed."""
    labels = torch.full((batch.sequences, batch.length), IGNORE_INDEX)
    positions = torch.zeros(batch.sequences, batch.length - 1, dtype=torch.bool)
    positions.view(-1)[: batch.supervised_tokens] = True
    labels[:, 1:][positions] = 0
    ids = torch.zeros_like(labels)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step():
        training_loss(model, inputs).backward()
        model.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("update", "gate"), [("hira", "token"), ("hira", "none"), ("lora", "token"), ("dora", "static")]
)
def test_peak_matches_real_step(update, gate, dtype, checkpointing):
    backbone = BackboneConfig(id="here", gradient_checkpointing=checkpointing)
    adapter = AdapterConfig(update=update, gate=gate, rank=8)
    predicted = step_costs(
        build_on_meta(LLAMA, backbone, adapter, getattr(torch, dtype)), BATCH, recomputed=checkpointing
    )
    model = AutoModelForCausalLM.from_config(LLAMA, dtype=getattr(torch, dtype))
    inject_adapters(model, adapter)
    prepare_for_training(model, backbone)
    assert predicted.peak == pytest.approx(allocated_peak(real_step(model.train(), BATCH)), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ALL_STORAGES)
@pytest.mark.parametrize(("update", "gate"), [("hira", "token"), ("lora", "token"), ("dora", "static")])
def test_peak_over_quantized_weights_matches_real_step(update, gate, storage, dtype, checkpointing):
    """Weights dominate here, so that the dense copies of a pass are a large part of the peak."""
    if storage.startswith("quanto") or (update, dtype) == ("dora", "bfloat16"):
        pytest.skip("kernels of quanto, and bfloat16 norms, allocate what the meta device does not show")
    config, batch = LlamaConfig(vocab_size=512, **WIDE), MicroBatch(2, 16, 8)
    backbone = BackboneConfig(id="here", gradient_checkpointing=checkpointing, quantization=storage)
    adapter = AdapterConfig(update=update, gate=gate, rank=8)
    predicted = build_on_meta(config, backbone, adapter, getattr(torch, dtype))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    quantize_linear_layers(model, storage)
    inject_adapters(model, adapter)
    prepare_for_training(model, backbone)
    assert model_sizes(predicted) == model_sizes(model)
    costs = step_costs(predicted, batch, recomputed=checkpointing)
    assert costs.peak == pytest.approx(allocated_peak(real_step(model.train(), batch)), rel=0.1)
    assert costs.peak > 512 * 1024 * getattr(torch, dtype).itemsize


def test_peak_of_other_architecture_matches_real_step():
    config = Qwen3Config(vocab_size=300, head_dim=16, **SIZES)
    predicted = step_costs(
        build_on_meta(config, BackboneConfig(id="here"), AdapterConfig(rank=4), torch.float32), BATCH
    )
    model = AutoModelForCausalLM.from_config(config)
    inject_adapters(model, AdapterConfig(rank=4))
    prepare_for_training(model, BackboneConfig(id="here"))
    assert predicted.peak == pytest.approx(allocated_peak(real_step(model.train(), BATCH)), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_one_chunk(dtype, monkeypatch):
    """Eight of 96 positions at a time. A soft cap, which follows the head, needs the logits of all."""
    monkeypatch.setattr("gatera_lightning.objectives.linear_cross_entropy.LOGITS_PER_CHUNK", 8 * 16384)
    sizes, backbone = SIZES | {"num_hidden_layers": 2, "vocab_size": 16384}, BackboneConfig(id="here")
    predicted, capped = (
        step_costs(build_on_meta(config(**sizes), backbone, AdapterConfig(rank=4), dtype), BATCH)
        for config in (LlamaConfig, Gemma2Config)
    )
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)
    inject_adapters(model, AdapterConfig(rank=4))
    prepare_for_training(model, backbone)
    assert predicted.peak == pytest.approx(allocated_peak(real_step(model.train(), BATCH)), rel=0.1)
    chunk, hidden = 8 * 16384 * (4 if dtype == torch.float32 else 6), 96 * 96 * dtype.itemsize
    assert predicted.logits == pytest.approx(
        chunk + 2 * hidden, rel=0.02
    )  # selected states and their gradient
    assert capped.logits > 12 * chunk


def test_model_sizes_match_manual_sums():
    model = build_on_meta(LLAMA, BackboneConfig(id="here"), AdapterConfig(rank=8), torch.bfloat16)
    layer = 2 * (96 * 96 * 2 + 2 * 96 * 32 + 3 * 96 * 256 + 2 * 96)  # q, o; k, v; gate, up, down; two norms
    sizes = model_sizes(model)
    assert sizes.layers == (layer,) * 4
    assert sizes.root == 2 * (2 * 512 * 96 + 96)
    assert sizes.adapter == 4 * sum(p.numel() for p in adapter_parameters(model).values())


@pytest.mark.parametrize(
    ("gate", "dtype", "matmuls"),
    [("none", torch.float32, 0), ("none", torch.bfloat16, 1), ("token", torch.float32, 1)],
)
def test_flops_match_manual_sums(gate, dtype, matmuls):
    """One matmul for a frozen layer, two for the head with its gradient; HiRA adds BA, and one if unmerged.

    A gate's product with a vector is not counted.
    """
    adapter = AdapterConfig(rank=8, gate=gate, target_modules=["up_proj"], layers=[3])
    costs = step_costs(build_on_meta(LLAMA, BackboneConfig(id="here"), adapter, dtype), BATCH)
    tokens, matrix = 8 * 64, 2 * 96 * 256
    layer = 2 * tokens * (96 * 96 * 2 + 2 * 96 * 32 + 3 * 96 * 256)
    attention = 2 * 64**2 * 96 * 8 * 4  # two matmuls over half of the scores
    assert (
        costs.forward_flops == 4 * layer + 2 * 2 * 96 * 96 * 512 + matrix * (8 + matmuls * tokens) + attention
    )
    # Only down_proj, and dP, dA and dB of up_proj: nothing below the adapted layer has a gradient.
    assert costs.backward_flops >= 2 * tokens * 96 * 256 + matrix * (tokens + 2 * 8)
    assert costs.backward_flops < costs.forward_flops


def test_model_code_that_needs_values_is_reported():
    model = build_on_meta(LLAMA, BackboneConfig(id="here"), AdapterConfig(rank=4), torch.float32)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: args[0].sum().item())
    with pytest.raises(
        ConfigError,
        match=r"^backbone.id: the costs of LlamaForCausalLM cannot be computed without its weights \(.*item",
    ):
        step_costs(model, BATCH)


def test_model_that_cannot_be_built_is_reported():
    """Falcon has its own table of attention implementations."""
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(
        ConfigError,
        match=r"^backbone.id: the costs of Falcon cannot be computed without its weights \(KeyError: ",
    ):
        build_on_meta(config, BackboneConfig(id="here"), AdapterConfig(rank=4), torch.bfloat16)


def test_flops_of_mixture_count_active_experts():
    """The difference of two widths: three matrices in two experts, and as much for their input's gradient."""
    adapter, flops = AdapterConfig(rank=8, gate="none", target_modules=["q_proj"], layers=[0]), []
    for width in (64, 4096):
        sizes = SIZES | {"intermediate_size": width, "num_local_experts": 4, "num_experts_per_tok": 2}
        model = build_on_meta(
            MixtralConfig(vocab_size=512, **sizes), BackboneConfig(id="here"), adapter, torch.bfloat16
        )
        flops.append(step_flops(model, BATCH))
    expected = 4 * 2 * (8 * 64) * 2 * 3 * 96 * (4096 - 64)
    assert [wide - narrow for narrow, wide in zip(*flops, strict=True)] == [expected, expected]


class Repeated(Objective):
    """Counts the loss of the next token several times."""

    def __init__(self, times):
        self.times = times

    def terms(self, model, batch, gates):
        return {f"loss_{i}": NextToken().terms(model, batch, gates)["task_loss"] for i in range(self.times)}


def test_own_objective_is_counted():
    model = build_on_meta(LLAMA, BackboneConfig(id="here"), AdapterConfig(rank=8), torch.float32)
    once, twice = (step_flops(model, BATCH, objectives=[Repeated(times)]) for times in (1, 2))
    attention = 2 * 64**2 * 96 * 8 * 4  # counted for one forward pass only, and twice that backward
    assert twice == (2 * once[0] - attention, 2 * once[1] - 2 * attention)
    once, twice = (step_costs(model, BATCH, objectives=[Repeated(times)]) for times in (1, 2))
    assert 1.5 * once.peak < twice.peak < 2 * once.peak


def test_mask_embeddings_and_sampler_head_are_counted():
    def built(masks):
        config = AdapterConfig(update="lora", gate=PositionGateConfig(mask_embeddings=masks), rank=8)
        return build_on_meta(LLAMA, BackboneConfig(id="here"), config, torch.float32)

    without, model = built(0), built(4)
    assert model_sizes(model).adapter - model_sizes(without).adapter == 4 * (4 * 96 + 3 * 96 * 96 + 2 * 96)
    assert model_sizes(model).frozen == model_sizes(without).frozen
    masks = step_flops(model, BATCH, objectives=[SelfDraft([4], form=MaskEmbeddings())])
    ids = step_flops(without, BATCH, objectives=[SelfDraft([4])])
    sampler, head = 2 * 3 * 96 * 96, 2 * 512 * 96
    rows = BATCH.supervised_tokens
    labeled = rows - 2  # the last row of each sequence with draft rows has no label
    # Two losses compute logits and a gradient each; total variation needs two logits and one gradient.
    assert masks[0] - ids[0] == rows * sampler + 4 * labeled * head - 3 * rows * head
