"""Gate entropy from the logit, and its terms in the loss."""

import pytest
import torch

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.objectives.gate_entropy import GateEntropy, gate_entropy, summed_gate_entropy


def test_entropy_and_gradient_match_definition():
    z = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    g = torch.sigmoid(z.detach())
    assert torch.allclose(gate_entropy(z), -(g * g.log() + (1 - g) * (1 - g).log()), atol=1e-14)
    (gradient,) = torch.autograd.grad(gate_entropy(z).sum(), z)
    assert torch.allclose(gradient, -z.detach() * g * (1 - g), atol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_of_saturated_gate_is_exact(sign):
    """The same formula in z instead of |z| is off by 100 % at z = 20 in fp32."""
    z = torch.tensor([12.0, 20.0, 40.0, 80.0])
    wide = z.double()
    exact = torch.log1p(torch.exp(-wide)) + wide * torch.exp(-wide) / (1 + torch.exp(-wide))
    assert torch.allclose(gate_entropy(sign * z).double(), exact, rtol=1e-5, atol=0)
    assert torch.isfinite(gate_entropy(torch.tensor([1e4, -1e4]))).all()


def test_entropy_is_largest_at_half_open_gate():
    assert float(gate_entropy(torch.zeros(()))) == pytest.approx(0.6931472)


def test_summed_entropy_ignores_padding():
    z = torch.randn(2, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    by_hand = sum(gate_entropy(z[layer, row, t]) for layer in (0, 1) for row, t in ((0, 0), (0, 1), (1, 0)))
    assert float(summed_gate_entropy(z, mask)) == pytest.approx(float(by_hand))


@pytest.fixture
def record():
    """Two layers, two sequences of three tokens; the second sequence has one token of padding."""
    logits = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "step_tokens": 8}
    return GateRecord(["first", "second"], logits), batch


def test_terms_average_over_tokens_and_layers(record):
    gates, batch = record
    terms = GateEntropy(0.5).terms(None, batch, gates)
    real = batch["attention_mask"].bool()
    g = torch.stack([torch.sigmoid(z)[real] for z in gates.logits])
    entropy = -(g * g.log() + (1 - g) * (1 - g).log())
    assert {name: (term.count, term.weight) for name, term in terms.items()} == {
        "gate_entropy": (16, 0.5),
        "gate_mean": (16, 0.0),
    }
    assert terms["gate_entropy"].total.item() == pytest.approx(entropy.sum().item(), rel=1e-6)
    assert float(terms["gate_mean"].total) == pytest.approx(float(g.sum()), rel=1e-6)
    assert not terms["gate_mean"].total.requires_grad


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_entropy_without_weight_has_no_gradient(record, weight):
    gates, batch = record
    assert GateEntropy(weight).terms(None, batch, gates)["gate_entropy"].total.requires_grad == (weight > 0)


@pytest.mark.parametrize(("gate", "weight"), [("none", 0.1), ("token", 0.0)])
def test_nothing_recorded_gives_no_terms(record, tiny_llama, gate, weight):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=2, gate=gate))
    assert GateEntropy(weight).terms(model, record[1], GateRecord()) == {}


def test_entropy_before_forward_pass_is_rejected(record, tiny_llama):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=2))
    with pytest.raises(ValueError, match="place it after the objective that runs the model"):
        GateEntropy(0.1).terms(model, record[1], GateRecord())
