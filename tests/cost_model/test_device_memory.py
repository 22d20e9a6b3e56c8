"""Memory and communication against the formulas of docs/results/scaling.md, and against a sharded run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from gatera_lightning import AdapterConfig, BackboneConfig
from gatera_lightning.cost_model.device_memory import Layout, Memory, communication, predict_memory
from gatera_lightning.cost_model.step_costs import (
    MicroBatch,
    ModelSizes,
    StepCosts,
    build_on_meta,
    model_sizes,
    step_costs,
)

SIZES = ModelSizes(frozen=1000, adapter=80, layers=(300, 500))
COSTS = StepCosts(activations=400, logits=50, peak=700, forward_flops=2, backward_flops=5)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(1, 1), "1 rank"),
        (Layout(8, 1), "8 ranks, each with the full model (DDP)"),
        (Layout(1, 8), "8 ranks, 8 shards (FSDP2)"),
        (Layout(1, 8, True), "8 ranks, 8 shards (FSDP2, stored on the CPU)"),
        (Layout(2, 4), "8 ranks, 4 shards (HSDP, 2 copies)"),
    ],
)
def test_layout_describes_itself(layout, text):
    assert str(layout) == text


@pytest.mark.parametrize(
    ("layout", "once", "thrice"),
    [
        (Layout(1, 1), {}, {}),
        # 2 · 80 · 7/8, for any number of micro-batches
        (Layout(8, 1), {"all-reduce": 140}, {"all-reduce": 140}),
        # (2 · 800 + 200 + 2 · 80) · 7/8 and 80 · 7/8
        (
            Layout(1, 8),
            {"all-gather": 1715, "reduce-scatter": 70},
            {"all-gather": 5145, "reduce-scatter": 210},
        ),
        # 1960 · 3/4, 80 · 3/4, and 2 · (80 / 4) · 1/2
        (
            Layout(2, 4),
            {"all-gather": 1470, "reduce-scatter": 60, "all-reduce": 20},
            {"all-gather": 4410, "reduce-scatter": 180, "all-reduce": 60},
        ),
    ],
    ids=str,
)
def test_communication_matches_manual_sums(layout, once, thrice):
    assert communication(SIZES, layout, 1) == once
    assert communication(SIZES, layout, 3) == thrice


@pytest.mark.parametrize(
    ("layout", "weights", "adapter", "peak"),
    [
        (Layout(1, 1), 1000, 80, 1000 + 3 * 80 + 700),
        (Layout(8, 1), 1000, 80, 1000 + 3 * 80 + 700),
        # a quarter, the root group, twice the larger layer; a quarter of the gradients in the step's peak too
        (Layout(1, 4), 250 + 200 + 2 * 500, 20, 1450 + 3 * 20 + 640),
        (Layout(2, 4), 250 + 200 + 2 * 500, 20, 1450 + 3 * 20 + 640),
        (Layout(1, 4, offload=True), 200 + 2 * 500, 0, 1200 + 640),
    ],
    ids=str,
)
def test_predict_memory_matches_manual_sums(layout, weights, adapter, peak):
    assert predict_memory(SIZES, COSTS, layout) == Memory(
        {
            "weights": weights,
            "adapter": adapter,
            "gradients": adapter,
            "moments": 2 * adapter,
            "activations": 400,
            "logits": 50,
        },
        peak,
    )


def test_predict_memory_counts_optimizer_temporaries_when_activations_are_small():
    costs = StepCosts(activations=50, logits=5, peak=150, forward_flops=2, backward_flops=5)
    assert predict_memory(SIZES, costs, Layout(1, 1)).peak == 1000 + 80 + 160 + 80 + 160


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [512, 16384], ids=["large layers", "large head"])
def test_predict_memory_matches_one_of_two_ranks(tmp_path, vocabulary):
    """What the allocator had handed out on one of two sharded ranks, weights and moments included."""
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
