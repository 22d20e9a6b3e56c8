"""Counts of skipped tokens: padding is left out, and generated tokens are not counted."""

import pytest
import torch

from gatera_lightning import AdapterConfig, inject_adapters, record_gates
from gatera_lightning.gate_analysis.skipped_tokens import (
    SkippedTokens,
    counting_skipped_tokens,
    describe_shares,
    gates_decide,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.fixture
def model(tiny_llama, randomize):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(gate="hard", rank=2, target_modules=["q_proj", "up_proj"]))
    return randomize(model).eval()


def test_shares_by_module_and_layer(model):
    ids = torch.arange(10).reshape(2, 5)
    counts = SkippedTokens()
    with torch.no_grad():
        with record_gates(model) as gates:
            model(input_ids=ids, attention_mask=MASK)
        for row in (0, 1):
            with counting_skipped_tokens(model, counts, first_pass_only=False):
                model(input_ids=ids[row : row + 1], attention_mask=MASK[row : row + 1])
    closed = {n: (z <= 0)[MASK == 1].double().mean() for n, z in zip(gates.names, gates.logits, strict=True)}
    shares = counts.shares()
    assert shares["tokens"] == 8
    assert shares["modules"] == pytest.approx({name: float(share) for name, share in closed.items()})
    assert shares["share"] == pytest.approx(float(torch.stack(list(closed.values())).mean()))
    first = [share for name, share in closed.items() if "layers.0" in name]
    assert shares["layers"]["0"] == pytest.approx(float(torch.stack(first).mean()))
    assert len(set(shares["modules"].values())) > 1
    assert describe_shares(shares).startswith(f"{shares['share']:.1%} of 8 tokens; by layer 0: ")
    counts.clear()
    assert counts.shares() == {}


def test_generation_counts_the_prompt_only(model):
    counts = SkippedTokens()
    with counting_skipped_tokens(model, counts, first_pass_only=True):
        model.generate(input_ids=torch.arange(6).reshape(1, 6), max_new_tokens=4, do_sample=False)
    assert counts.shares()["tokens"] == 6


@pytest.mark.parametrize(
    ("gate", "decides"), [("hard", True), ("threshold", True), ("token", False), ("none", False)]
)
def test_which_gates_decide(tiny_llama, gate, decides):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(gate=gate, rank=2))
    assert gates_decide(model) is decides
