"""Threshold gates: the rule, the gradient of τ in closed form, and the start at 0."""

import math

import pytest
import torch
from adapted_layers import ALL_UPDATES, actual, adapted_layer, layer_inputs

from gatera_lightning.adapters.gates import ThresholdGateConfig


def gated_layer(update, *, threshold):
    gate = ThresholdGateConfig()
    layer = adapted_layer(update, gate, (12, 10, 3), dtype=torch.float64, adapter_dtype="float64")
    with torch.no_grad():
        layer.update.b.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
        layer.gate.threshold.fill_(threshold)
    return layer.train()


def ratios(layer, x):
    with torch.no_grad():
        return layer.update.delta(x, layer.base).norm(dim=-1) / (x @ layer.base.weight.t()).norm(dim=-1)


@pytest.mark.parametrize("update", ALL_UPDATES)
def test_step_equals_closed_form(update):
    layer = gated_layer(update, threshold=0.0)
    x, dy = layer_inputs(layer, (2, 7))
    r = ratios(layer, x)
    threshold = float(r.median())
    layer = gated_layer(update, threshold=threshold)
    y, grads = actual(layer, x, dy)
    u = layer.update.delta(x, layer.base).detach()
    kept = (r >= threshold).double()
    assert 0 < kept.sum() < 14
    torch.testing.assert_close(y, layer.base(x).detach() + kept.unsqueeze(-1) * u, rtol=0, atol=1e-12)
    soft = torch.sigmoid(r.log() - math.log(threshold))
    of_log = -((dy * u).sum(-1) * soft * (1 - soft)).sum()
    torch.testing.assert_close(grads["gate.threshold"][0], of_log / threshold, rtol=1e-10, atol=0)
    # A and B learn from the tokens that are kept, and from them only.
    delta = layer.update.delta(x.detach(), layer.base)
    expected = torch.autograd.grad(delta, list(layer.update.parameters()), dy * kept.unsqueeze(-1))
    for (name, _), gradient in zip(layer.update.named_parameters(), expected, strict=True):
        torch.testing.assert_close(grads[f"update.{name}"], gradient, rtol=1e-10, atol=1e-12)


def test_start_at_zero_keeps_every_token_and_can_rise():
    layer = gated_layer("lora", threshold=0.0)
    x, dy = layer_inputs(layer, (2, 7))
    r = ratios(layer, x)
    y, grads = actual(layer, x, dy)
    u = layer.update.delta(x, layer.base).detach()
    torch.testing.assert_close(y, layer.base(x).detach() + u, rtol=0, atol=1e-12)
    limit = -((dy * u).sum(-1) / r).sum()  # of −(1/τ) Σ (dy·u) r τ / (r + τ)², as τ goes to 0
    torch.testing.assert_close(grads["gate.threshold"][0], limit, rtol=1e-3, atol=0)


def test_first_step_trains_the_update():
    layer = gated_layer("lora", threshold=0.0)
    with torch.no_grad():
        layer.update.b.zero_()
    x, dy = layer_inputs(layer, (2, 7))
    _, grads = actual(layer, x, dy)
    assert grads["update.b"].abs().max() > 0
    assert all(bool(torch.isfinite(gradient).all()) for gradient in grads.values())
    assert float(grads["gate.threshold"]) == 0.0


def test_negative_threshold_counts_as_zero():
    layer, zero = gated_layer("lora", threshold=-0.5), gated_layer("lora", threshold=0.0)
    (x, dy), (x_, _) = layer_inputs(layer, (2, 7)), layer_inputs(zero, (2, 7))
    (y, grads), (y_, grads_) = actual(layer, x, dy), actual(zero, x_, dy)
    assert torch.equal(y, y_)
    assert torch.equal(grads["gate.threshold"], grads_["gate.threshold"])  # so that it can rise again


def test_layer_of_zeros_keeps_every_update():
    layer = gated_layer("lora", threshold=0.1)
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.update.b.mul_(1e3)
    x, dy = layer_inputs(layer, (2, 7))
    y, grads = actual(layer, x, dy)
    torch.testing.assert_close(y, layer.base(x).detach() + layer.update.delta(x, layer.base).detach())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in grads.values())


def test_transforms_start_open_too():
    layer = gated_layer("lora", threshold=0.0)
    with torch.no_grad():
        layer.update.b.zero_()
    x, dy = layer_inputs(layer, (2, 7), requires_grad=False)
    names = dict(layer.named_parameters())

    def loss(b):
        return (torch.func.functional_call(layer, {**names, "update.b": b}, (x,)) * dy).sum()

    assert torch.func.grad(loss)(layer.update.b.detach()).abs().max() > 0


def test_nan_reaches_the_output():
    layer = gated_layer("lora", threshold=0.1)
    x, _ = layer_inputs(layer, (2, 7), requires_grad=False)
    x[0, 0, 0] = float("nan")
    assert bool(layer(x)[0, 0].isnan().all())
    assert not bool(layer(x)[0, 1:].isnan().any())


def test_zero_input_keeps_gradients_finite():
    layer = gated_layer("hira", threshold=0.1)
    x, dy = layer_inputs(layer, (2, 7))
    with torch.no_grad():
        x[0] = 0
    _, grads = actual(layer, x, dy)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in grads.values())


def test_evaluation_applies_the_same_rule():
    layer = gated_layer("hira", threshold=0.05)
    x, _ = layer_inputs(layer, (2, 7))
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "adapter.gate.threshold: -0.1; accepted: a number of at least 0"),
        ({"threshold": 0.1}, "adapter.gate.threshold: 0.1: no token would ever be open"),
        ({"sparsity_weight": float("nan")}, "adapter.gate.sparsity_weight: nan; accepted"),
    ],
    ids=["negative", "dead_start", "sparsity_weight"],
)
def test_invalid_settings_are_named(settings, message):
    assert ThresholdGateConfig(**settings).problems()[0].startswith(message)
