"""Every update with every gate: output and all gradients against the dense reference."""

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import (
    ALL_METHODS,
    DTYPES,
    GATE_NAMES,
    SIZES,
    UPDATE_NAMES,
    actual,
    adapted_layer,
    assert_all_close,
    assert_close,
    gate_config,
    layer_inputs,
    reference,
)
from torch import nn

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.fingerprint import WeightFingerprint
from gatera_lightning.adapters.layer import AdaptedLinear


@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_forward_and_gradients_equal_dense_reference(randomize, update, gate, kind, bias, size, batch):
    dtype, adapter_dtype, tol = DTYPES[kind]
    layer = randomize(adapted_layer(update, gate, size, bias=bias, dtype=dtype, adapter_dtype=adapter_dtype))
    x, dy = layer_inputs(layer, batch)
    expected_names = {"update.a", "update.b"}
    expected_names |= {"dora": {"update.magnitude"}, "abba": {"update.weight_a", "update.weight_b"}}.get(
        update, set()
    )
    expected_names |= {"none": set(), "static": {"gate.bias"}, "token": {"gate.bias", "gate.weight"}}[gate]
    assert set(layer.adapter_params()) == expected_names
    y, grads = actual(layer, x, dy)
    tol *= 2 if update == "abba" else 1  # a product of four factors is rounded twice as often
    assert_all_close((y, grads), reference(layer, x, dy), tol)
    assert y.dtype == x.grad.dtype == dtype
    assert {grads[n].dtype for n in expected_names} == {getattr(torch, adapter_dtype)}
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_fresh_layer_equals_frozen_layer(update, gate, bias, kind):
    dtype, adapter_dtype, _ = DTYPES[kind]
    layer = adapted_layer(
        update, gate_config(gate, bias=-2.0), bias=bias, dtype=dtype, adapter_dtype=adapter_dtype
    )
    x, _ = layer_inputs(layer)
    y, frozen = layer(x), layer.base(x)
    if update != "dora" or not bias:
        assert torch.equal(y, frozen)
    else:  # DoRA adds the bias after rescaling: one more rounding than F.linear
        assert (y - frozen).abs().max() <= 2 * torch.finfo(dtype).eps * frozen.abs().max()
        assert torch.equal(y, F.linear(x, layer.base.weight) + layer.base.bias)


@pytest.mark.parametrize("gate", ["static", "token"])
@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_open_gate_equals_ungated_method(randomize, update, gate):
    gated, ungated = randomize(adapted_layer(update, gate)), randomize(adapted_layer(update, "none"))
    with torch.no_grad():
        gated.gate.bias.fill_(40)  # sigmoid(40 + w·x) is 1 in float32
        for name, parameter in ungated.adapter_params().items():
            parameter.copy_(gated.adapter_params()[name])
    (x, dy), (x_, _) = layer_inputs(gated), layer_inputs(ungated)
    (y, grads), (y_, grads_) = actual(gated, x, dy), actual(ungated, x_, dy)
    torch.testing.assert_close(y, y_)
    for name, gradient in grads_.items():
        torch.testing.assert_close(grads[name], gradient)
    assert grads["gate.bias"].abs().item() < 1e-12


@pytest.mark.parametrize("gate", ["static", "token"])
@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_closed_gate_equals_frozen_layer(randomize, update, gate):
    layer = randomize(adapted_layer(update, gate))
    with torch.no_grad():
        layer.gate.bias.fill_(-60)
    x, dy = layer_inputs(layer)
    y, grads = actual(layer, x, dy)
    torch.testing.assert_close(y, layer.base(x))
    assert all(gradient.abs().max() < 1e-12 for name, gradient in grads.items() if name != "x")


@pytest.mark.parametrize("kind", ["fp32", "fp64"])
@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_dropout_acts_only_on_update_input(randomize, update, gate, kind):
    dtype, adapter_dtype, tol = DTYPES[kind]
    layer = randomize(
        adapted_layer(update, gate, dropout=0.5, dtype=dtype, adapter_dtype=adapter_dtype)
    ).train()
    x, dy = layer_inputs(layer)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.5)  # 0 or 2
    assert {0.0, 2.0} == set(mask.unique().tolist())
    torch.manual_seed(5)
    found = actual(layer, x, dy)
    assert_all_close(found, reference(layer, x, dy, mask.double()), tol)


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_evaluation_has_no_dropout(randomize, update):
    layer = randomize(adapted_layer(update, "token", dropout=0.5)).eval()
    x, dy = layer_inputs(layer)
    assert_all_close(actual(layer, x, dy), reference(layer, x, dy), 1e-5)


@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_input_without_gradient(randomize, update, gate):
    layer = randomize(adapted_layer(update, gate))
    x, dy = layer_inputs(layer, requires_grad=False)
    y, grads = actual(layer, x, dy)
    expected_y, expected = reference(layer, x, dy)
    expected.pop("x")
    assert_all_close((y, grads), (expected_y, expected), 1e-5)
    assert x.grad is None


@pytest.mark.parametrize("trained", ["update.a", "update.b", "gate"])
def test_partly_frozen_parameters(randomize, trained):
    layer = randomize(adapted_layer("hira", "token"))
    for name, parameter in layer.adapter_params().items():
        parameter.requires_grad_(name.startswith(trained))
    x, dy = layer_inputs(layer)
    _, grads = actual(layer, x, dy)
    _, expected = reference(layer, x, dy)
    for name in expected:
        if name == "x" or name.startswith(trained):
            assert_close(f"d{name}", grads[name], expected[name], 1e-5)
        else:
            assert grads[name] is None


@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_strided_input_and_expanded_gradient(randomize, update, gate):
    layer = randomize(adapted_layer(update, gate))
    x = layer_inputs(layer, (3, 2))[0].detach().transpose(0, 1).requires_grad_()
    dy = torch.full((1, 1, 1), 0.7).expand(2, 3, layer.out_features)
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    assert_all_close(actual(layer, x, dy), reference(layer, x, dy), 1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_autocast_with_float32_backbone(randomize, update, gate, x_dtype):
    layer = randomize(adapted_layer(update, gate))
    x, dy = layer_inputs(layer)
    x = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    grads = {n: p.grad for n, p in layer.adapter_params().items()} | {"x": x.grad}
    assert x.grad.dtype == x_dtype
    assert_all_close((y.detach(), grads), reference(layer, x, dy), 3e-2)


@pytest.mark.parametrize(
    ("gate", "settings"),
    [*((gate, {}) for gate in GATE_NAMES), ("token", {"skip_below": 0.4, "merge_above": 0.6})],
    ids=str,
)
def test_output_can_be_modified_in_place(randomize, gate, settings):
    """OLMo clamps queries and keys in place."""
    layer = randomize(adapted_layer("hira", gate_config(gate, **settings)))
    x, dy = layer_inputs(layer)
    layer(x).clamp_(-0.1, 0.1).backward(dy)
    found = x.grad
    x.grad = None
    layer(x).clamp(-0.1, 0.1).backward(dy)
    assert torch.equal(found, x.grad)


def test_train_mode_without_gradients_equals_evaluation(randomize):
    layer = randomize(adapted_layer("hira", "none"))
    x, _ = layer_inputs(layer)
    with torch.no_grad():
        assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize(("update", "gate"), ALL_METHODS)
def test_one_dimensional_input(update, gate):
    layer = adapted_layer(update, gate)
    x, _ = layer_inputs(layer)
    token = x.detach()[0, 0].clone().requires_grad_()
    y = layer(token)
    assert torch.allclose(y, layer(x)[0, 0], atol=1e-6)
    y.sum().backward()
    assert token.grad.shape == token.shape


def test_layer_has_attributes_of_linear():
    layer = adapted_layer("hira", "token")
    assert (layer.in_features, layer.out_features) == (7, 13)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert layer.bias is not None
    assert adapted_layer("hira", "token", bias=False).bias is None
    assert "update=hira, gate=token, rank=3" in repr(layer)


def test_gate_listener_receives_logits():
    layer, seen = adapted_layer("hira", "token"), []
    x, _ = layer_inputs(layer)
    layer.set_gate_listener(seen.append)
    assert layer.gate_listener is not None
    layer(x)
    layer.set_gate_listener(None)
    layer(x)
    assert len(seen) == 1
    assert torch.equal(seen[0], layer.gate(x))


def test_fingerprint_can_be_set_for_weight_loaded_later():
    with torch.device("meta"):
        layer = AdaptedLinear(nn.Linear(6, 5), AdapterConfig(rank=2))
    assert layer.base_fingerprint == WeightFingerprint("", "")
    layer.set_base_fingerprint(WeightFingerprint("abc", "def"))
    assert layer.base_fingerprint == WeightFingerprint("abc", "def")
