"""The sparsity term: mean openness without padding, and the share of skipped tokens."""

import pytest
import torch

from gatera_lightning import AdapterConfig, HardGateConfig, ThresholdGateConfig, inject_adapters
from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.objectives import GateEntropy, GateSparsity, NextToken
from gatera_lightning.objectives.training_loss import objectives_for, objectives_problems


@pytest.fixture
def record():
    """Two layers, two sequences of three tokens; the second sequence has one token of padding."""
    logits = [torch.tensor([[-1.0, 0.0, 2.0], [3.0, -4.0, 5.0]], requires_grad=True) for _ in range(2)]
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "step_tokens": 8}
    return GateRecord(["first", "second"], logits), batch


def test_terms_average_over_tokens_and_layers(record):
    gates, batch = record
    terms = GateSparsity(0.5).terms(None, batch, gates)
    counted = torch.tensor([-1.0, 0.0, 2.0, 3.0, -4.0])  # without padding
    openness = 2 * torch.sigmoid(counted)
    assert {name: (term.count, term.weight) for name, term in terms.items()} == {
        "gate_openness": (16, 0.5),
        "gate_skipped": (16, 0.0),
    }
    assert terms["gate_openness"].total.item() == pytest.approx(openness.sum().item(), rel=1e-6)
    assert float(terms["gate_skipped"].total) == 2 * 3  # a logit of 0 is skipped, as in evaluation
    terms["gate_openness"].total.backward()
    expected = torch.sigmoid(counted) * torch.sigmoid(-counted)
    found = gates.logits[0].grad.flatten()
    torch.testing.assert_close(found[:5], expected)
    assert found[5] == 0


def test_weight_zero_only_logs(record):
    gates, batch = record
    terms = GateSparsity(0.0).terms(None, batch, gates)
    assert not any(term.total.requires_grad for term in terms.values())


def test_without_gates_there_are_no_terms(tiny_llama, record):
    _, batch = record
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(gate="none", rank=2))
    assert GateSparsity(0.5).terms(model, batch, GateRecord()) == {}


def test_gates_that_were_not_recorded_are_named(tiny_llama, record):
    _, batch = record
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(gate="hard", rank=2))
    with pytest.raises(ValueError, match="GateSparsity: no gates were recorded"):
        GateSparsity(0.5).terms(model, batch, GateRecord())


@pytest.mark.parametrize(
    "gate", [HardGateConfig(sparsity_weight=0.25), ThresholdGateConfig(sparsity_weight=0.25)]
)
def test_gates_that_decide_have_the_term_by_default(gate):
    adapter = AdapterConfig(gate=gate)
    assert objectives_for(adapter) == [NextToken(), GateEntropy(0.0), GateSparsity(0.25)]
    assert objectives_problems(objectives_for(adapter), adapter) == []
    (problem,) = objectives_problems([NextToken()], adapter)
    assert problem.startswith("adapter.gate.sparsity_weight: 0.25, but among the objectives there is no")
