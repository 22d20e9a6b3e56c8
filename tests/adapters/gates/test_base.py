"""Gates: initial values, logits, values and registration."""

from dataclasses import dataclass

import pytest
import torch
from adapted_layers import GATE_NAMES
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning.adapters.gates import (
    GATES,
    NoGateConfig,
    StaticGateConfig,
    TokenGate,
    TokenGateConfig,
    describe_gates,
    register_gate,
)

PLACE = {"dtype": torch.float64, "device": torch.device("cpu")}


def test_no_gate_has_no_module():
    assert NoGateConfig().build(7, **PLACE) is None


def test_static_gate_starts_at_bias_for_every_token():
    gate = StaticGateConfig(bias=-2.0).build(7, **PLACE)
    x = torch.randn(2, 3, 7)
    assert torch.equal(gate(x), torch.full((2, 3), -2.0, dtype=torch.float64))
    assert torch.equal(gate.constant_value(), torch.sigmoid(torch.tensor([-2.0], dtype=torch.float64)))
    assert not gate.depends_on_token
    assert gate.linear_logit() is None


def test_static_gate_can_be_counted_without_gradients():
    gate = StaticGateConfig().build(7, **PLACE)
    with torch.no_grad(), FlopCounterMode(display=False):
        assert not gate(torch.randn(2, 7)).requires_grad


def test_token_gate_starts_at_bias_and_depends_on_token():
    gate = TokenGateConfig(bias=-2.0).build(7, **PLACE)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.equal(gate(x), torch.full((2, 3), -2.0, dtype=torch.float64))
    with torch.no_grad():
        gate.weight.normal_()
    torch.testing.assert_close(gate(x), x @ gate.weight - 2)
    assert gate.depends_on_token
    with pytest.raises(
        NotImplementedError, match="TokenGate: implement constant_value, or set depends_on_token"
    ):
        gate.constant_value()


def test_linear_logit_is_offered_only_by_token_gate_itself():
    gate = TokenGateConfig(bias=0.5).build(7, **PLACE)
    weight, bias = gate.linear_logit()
    assert torch.equal(weight, gate.weight)
    assert bias == 0.5

    class Negated(TokenGate):
        def forward(self, x, base_out=None, update_out=None):
            return -super().forward(x)

    assert Negated(7, bias=0.5, **PLACE).linear_logit() is None


def test_training_step_rounds_values_beyond_thresholds():
    gate = TokenGateConfig(skip_below=0.1, merge_above=0.9).build(7, **PLACE)
    logit = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    values = gate.values(logit)
    assert values.rounded.tolist() == [0.0, 0.5, 1.0]
    assert torch.autograd.grad(values.rounded.sum(), logit, retain_graph=True)[0].tolist() == [0.0, 0.25, 0.0]
    exact = torch.sigmoid(logit)
    assert torch.equal(values.values, exact)
    with torch.no_grad():  # validation
        assert gate.values(logit).rounded is None
    assert gate.eval().values(logit).rounded is None
    gate.train().set_thresholds(0.0, 1.0)
    assert gate.values(logit).rounded is None
    assert torch.equal(gate.values(logit).values, exact)


def test_only_token_gate_has_thresholds():
    assert TokenGateConfig(skip_below=0.1).has_thresholds
    assert not TokenGateConfig().has_thresholds
    assert (StaticGateConfig().thresholds, NoGateConfig().thresholds) == ((0.0, 1.0), (0.0, 1.0))


def test_descriptions_list_every_gate():
    assert set(GATE_NAMES) < set(GATES)
    assert all(f"{kind} = {config.formula}" in describe_gates() for kind, config in GATES.items())


def test_register_gate_rejects_taken_name():
    @dataclass
    class Other(StaticGateConfig):
        pass

    with pytest.raises(ValueError, match="a gate named 'static' is already registered: StaticGateConfig"):
        register_gate(Other)
    assert GATES["static"] is StaticGateConfig
