"""How the terms of several objectives become one loss."""

import pytest
import torch

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters
from gatera_lightning.objectives import GateEntropy, NextToken, Objective, Term, evaluate_objectives
from gatera_lightning.objectives.base import weighted_sum


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=2))
    return model.train()


@pytest.fixture
def batch():
    ids = torch.arange(3, 15).view(2, 6)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "step_supervised_tokens": 10,
        "step_tokens": 12,
    }


class Fixed(Objective):
    """Returns given terms."""

    def __init__(self, **terms):
        self.found = terms

    def terms(self, model, batch, gates):
        return self.found


class SecondPass(Objective):
    """Runs the model a second time, as a distillation from the model itself would."""

    def terms(self, model, batch, gates):
        self.received = gates
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        return {"second": Term(logits.sum(), 1)}


def test_loss_is_weighted_sum_of_averages(model, batch):
    objectives = [
        Fixed(one=Term(torch.tensor(6.0), 4), two=Term(torch.tensor(10.0), 5, weight=0.5)),
        Fixed(logged=Term(torch.tensor(9.0), 3, weight=0.0)),
    ]
    found = evaluate_objectives(objectives, model, batch)
    assert float(found.loss) == 6 / 4 + 0.5 * 10 / 5
    assert {name: float(value) for name, value in found.values.items()} == {
        "one": 1.5,
        "two": 2.0,
        "logged": 3.0,
    }
    assert found.weights == {"one": 1.0, "two": 0.5, "logged": 0.0}


def test_values_and_gates_are_detached(model, batch):
    found = evaluate_objectives([NextToken(), GateEntropy(0.1)], model, batch)
    assert list(found.values) == ["task_loss", "gate_entropy", "gate_mean"]
    assert found.loss.requires_grad
    assert not any(value.requires_grad for value in (*found.values.values(), *found.gates.logits))
    assert len(found.gates.names) == len(found.gates.logits) == 10


def test_gates_are_those_of_first_forward_pass(model, batch):
    """The second one runs without a graph, which recording would reject."""
    second = SecondPass()
    found = evaluate_objectives([NextToken(), second, GateEntropy(0.1)], model, batch)
    alone = evaluate_objectives([NextToken(), GateEntropy(0.1)], model, batch)
    assert second.received.names == found.gates.names == alone.gates.names
    assert found.values["gate_entropy"].equal(alone.values["gate_entropy"])
    assert all(map(torch.equal, found.gates.logits, alone.gates.logits))


def test_term_of_weight_zero_has_no_gradient(model, batch):
    parameter = next(iter(adapter_parameters(model).values()))
    objectives = [NextToken(), Fixed(logged=Term(parameter.sum(), 1, weight=0.0))]
    with_it, without = (
        torch.autograd.grad(evaluate_objectives(chosen, model, batch).loss, parameter)[0]
        for chosen in (objectives, objectives[:1])
    )
    assert with_it.equal(without)


def test_duplicate_term_is_rejected(model, batch):
    objectives = [NextToken(), Fixed(task_loss=Term(torch.tensor(1.0), 1))]
    with pytest.raises(ValueError, match=r"^Fixed: another objective already has \['task_loss'\]$"):
        evaluate_objectives(objectives, model, batch)


def test_no_terms_are_rejected(model, batch):
    with pytest.raises(ValueError, match="the objectives returned no terms"):
        evaluate_objectives([Fixed()], model, batch)
    with pytest.raises(ValueError, match="the objectives returned no terms"):
        weighted_sum({}, {})


def test_objective_needs_terms():
    class Incomplete(Objective):
        pass

    with pytest.raises(TypeError, match="terms"):
        Incomplete()
