"""Predicted costs against what PyTorch's own allocator handed out in a real step, and against sums by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError, inject_adapters, record_gates
from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.backbone.loading import prepare_for_training
from gatera_lightning.backbone.recomputation import recompute_elementwise
from gatera_lightning.cost_model.device_memory import Layout, predict_memory
from gatera_lightning.cost_model.step_costs import (
    MicroBatch,
    build_on_meta,
    model_sizes,
    step_costs,
    step_flops,
)
from gatera_lightning.objectives.linear_cross_entropy import cross_entropy_in_head
from gatera_lightning.objectives.next_token import head_only_at, summed_gate_entropy

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(vocab_size=512, **SIZES)
BATCH = MicroBatch(sequences=8, length=64, supervised_tokens=96)


def allocated_peak(step):
    """Bytes that the allocator had out at the worst moment of ``step()``."""
    step()  # what is made once is there already
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def real_step(model, batch):
    """One micro-batch in GateRAModule's way; gradients are given back."""
    ids, mask = torch.zeros(2, batch.rows, batch.tokens, dtype=torch.long)
    mask += 1
    keep = torch.zeros(batch.rows, batch.tokens, dtype=torch.bool)
    keep.view(-1)[: batch.targets] = True

    targets = torch.zeros(batch.targets, dtype=torch.long)

    def step():
        with (
            recompute_elementwise(),
            head_only_at(model, keep),
            record_gates(model) as gates,
            cross_entropy_in_head(model, targets),
        ):
            loss = model(input_ids=ids, attention_mask=mask).logits.squeeze()
        z = gates.stacked(mask)
        (loss if z is None else loss + summed_gate_entropy(z, mask)).backward()
        model.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("update", "gate"), [("hira", "token"), ("hira", "none"), ("lora", "token"), ("dora", "static")]
)
def test_the_peak_of_a_real_step(update, gate, dtype, checkpointing):
    backbone = BackboneConfig(id="here", gradient_checkpointing=checkpointing)
    adapter = AdapterConfig(update=update, gate=gate, rank=8)
    planned = step_costs(
        build_on_meta(LLAMA, backbone, adapter, getattr(torch, dtype)), BATCH, recomputed=checkpointing
    )
    model = AutoModelForCausalLM.from_config(LLAMA, dtype=getattr(torch, dtype))
    inject_adapters(model, adapter)
    prepare_for_training(model, backbone)
    assert planned.peak == pytest.approx(allocated_peak(real_step(model.train(), BATCH)), rel=0.1)


def test_another_family():
    config = Qwen3Config(vocab_size=300, head_dim=16, **SIZES)
    planned = step_costs(
        build_on_meta(config, BackboneConfig(id="here"), AdapterConfig(rank=4), torch.float32), BATCH
    )
    model = AutoModelForCausalLM.from_config(config)
    inject_adapters(model, AdapterConfig(rank=4))
    prepare_for_training(model, BackboneConfig(id="here"))
    assert planned.peak == pytest.approx(allocated_peak(real_step(model.train(), BATCH)), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_a_wide_vocabulary_only_a_chunk_is_there(dtype, monkeypatch):
    """Of 96 targets eight at a time; a soft cap comes after the head, and needs the logits of all."""
    monkeypatch.setattr("gatera_lightning.objectives.linear_cross_entropy.LOGITS_PER_CHUNK", 8 * 16384)
    sizes, backbone = SIZES | {"num_hidden_layers": 2, "vocab_size": 16384}, BackboneConfig(id="here")
    planned, capped = (
        step_costs(build_on_meta(config(**sizes), backbone, AdapterConfig(rank=4), dtype), BATCH)
        for config in (LlamaConfig, Gemma2Config)
    )
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)
    inject_adapters(model, AdapterConfig(rank=4))
    prepare_for_training(model, backbone)
    assert planned.peak == pytest.approx(allocated_peak(real_step(model.train(), BATCH)), rel=0.1)
    of_chunk, gradient = 8 * 16384 * (4 if dtype == torch.float32 else 6), 96 * 96 * dtype.itemsize
    assert planned.logits == pytest.approx(of_chunk + gradient, rel=0.02)
    assert capped.logits > 12 * of_chunk


def test_sizes_by_hand():
    model = build_on_meta(LLAMA, BackboneConfig(id="here"), AdapterConfig(rank=8), torch.bfloat16)
    layer = 2 * (96 * 96 * 2 + 2 * 96 * 32 + 3 * 96 * 256 + 2 * 96)  # q, o; k, v; gate, up, down; two norms
    sizes = model_sizes(model)
    assert sizes.layers == (layer,) * 4
    assert sizes.root == 2 * (2 * 512 * 96 + 96)
    assert sizes.adapter == 4 * sum(p.numel() for p in adapter_parameters(model).values())


@pytest.mark.parametrize(
    ("gate", "dtype", "products"),
    [("none", torch.float32, 0), ("none", torch.bfloat16, 1), ("token", torch.float32, 1)],
)
def test_operations_by_hand(gate, dtype, products):
    """A frozen layer is one product, the head another, of its loss's gradient; HiRA's is BA, and another unless merged.

    A gate's product with a vector is not counted.
    """
    adapter = AdapterConfig(rank=8, gate=gate, target_modules=["up_proj"], layers=[3])
    costs = step_costs(build_on_meta(LLAMA, BackboneConfig(id="here"), adapter, dtype), BATCH)
    tokens, matrix = 8 * 64, 2 * 96 * 256
    layer = 2 * tokens * (96 * 96 * 2 + 2 * 96 * 32 + 3 * 96 * 256)
    attention = 2 * 64**2 * 96 * 8 * 4  # half of the square, two products
    assert (
        costs.forward_flops
        == 4 * layer + 2 * 2 * 96 * 96 * 512 + matrix * (8 + products * tokens) + attention
    )
    # Below the adapted layer nothing has a gradient: down_proj, and up_proj's dP, dA and dB.
    assert costs.backward_flops >= 2 * tokens * 96 * 256 + matrix * (tokens + 2 * 8)
    assert costs.backward_flops < costs.forward_flops


def test_a_model_whose_code_needs_numbers_is_said():
    model = build_on_meta(LLAMA, BackboneConfig(id="here"), AdapterConfig(rank=4), torch.float32)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: args[0].sum().item())
    with pytest.raises(
        ConfigError,
        match=r"^backbone.id: LlamaForCausalLM cannot be carried out without its numbers \(.*item",
    ):
        step_costs(model, BATCH)


def test_a_model_that_cannot_even_be_built_is_said():
    """Falcon keeps a table of attentions of its own."""
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(
        ConfigError, match=r"^backbone.id: Falcon cannot be carried out without its numbers \(KeyError: "
    ):
        build_on_meta(config, BackboneConfig(id="here"), AdapterConfig(rank=4), torch.bfloat16)


def test_operations_of_a_mixture_are_those_of_the_experts_that_a_token_meets():
    """By the difference of two widths: three matrices in each of two experts, twice again for the gradient of their input."""
    adapter, flops = AdapterConfig(rank=8, gate="none", target_modules=["q_proj"], layers=[0]), []
    for width in (64, 4096):
        sizes = SIZES | {"intermediate_size": width, "num_local_experts": 4, "num_experts_per_tok": 2}
        model = build_on_meta(
            MixtralConfig(vocab_size=512, **sizes), BackboneConfig(id="here"), adapter, torch.bfloat16
        )
        flops.append(step_flops(model, BATCH))
    expected = 4 * 2 * (8 * 64) * 2 * 3 * 96 * (4096 - 64)
    assert [wide - narrow for narrow, wide in zip(*flops, strict=True)] == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [512, 16384], ids=["layers_are_large", "the_head_is_large"])
def test_a_shard_of_two(tmp_path, vocabulary):
    """What one of two sharded processes really had out, weights and moments included."""
    script = Path(__file__).parents[1] / "helpers" / "memory_script.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out.json"), str(vocabulary)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    config = LlamaConfig(vocab_size=found["vocabulary"], **found["sizes"])
    model = build_on_meta(config, BackboneConfig(id="here"), AdapterConfig(rank=8), torch.float32)
    batch = MicroBatch(**found["batch"])
    memory = predict_memory(model_sizes(model), step_costs(model, batch), Layout(1, 2))
    assert memory.peak == pytest.approx(found["resident"] + found["peak"], rel=0.15)
    assert found["frozen"] == pytest.approx(model_sizes(model).frozen / 2, rel=0.02)
