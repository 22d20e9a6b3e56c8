"""Memory and communication against sums by hand: the formulas of docs/results/scaling.md with small numbers."""

import pytest

from gatera_lightning.cost_model.device_memory import Layout, Memory, communication, predict_memory, verdict
from gatera_lightning.cost_model.step_costs import ModelSizes, StepCosts

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
        # a quarter, the root group and twice the larger layer; a quarter of the gradients in the step's peak too
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


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        ("weights", "shard them (overlays/fsdp.yaml), over more devices, or with cpu_offload"),
        (
            "activations",
            "model.backbone.gradient_checkpointing: true if it is not, or more trainer.accumulate_grad_batches",
        ),
        ("logits", "more trainer.accumulate_grad_batches"),
        ("moments", "a smaller model.adapter.rank"),
        ("gradients", "a smaller model.adapter.rank"),
    ],
)
def test_verdict_advises_on_largest_part(largest, advice, monkeypatch):
    monkeypatch.setattr("gatera_lightning.cost_model.device_memory.GIB", 1)
    parts = dict.fromkeys(("weights", "adapter", "gradients", "moments", "activations", "logits"), 1)
    memory = Memory(parts | {largest: 2}, 7)
    expected = f"    of 5.5: DOES NOT FIT, by 1.5 GiB; most of it is {largest}: {advice}"
    assert verdict(memory, 5.5) == expected
    assert verdict(memory, 7) == "    of 7.0: fits"
