"""Hard gates: draws, decisions, straight-through gradients, and equal values by every form of the layer."""

import pytest
import torch
from adapted_layers import ALL_UPDATES, actual, adapted_layer, layer_inputs, reference_update
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning.adapters.gates import HardGateConfig
from gatera_lightning.adapters.inference import prepared_for_inference

READS = ("input", "outputs")


def gated_layer(randomize, update="hira", *, bias=0.0, layer_bias=True, **settings):
    gate = HardGateConfig(bias=bias, **settings)
    layer = adapted_layer(
        update, gate, (12, 10, 3), bias=layer_bias, dtype=torch.float64, adapter_dtype="float64"
    )
    return randomize(layer)


def reference(layer, x, dy, drawn, weight):
    """Compute output and gradients by autograd; drawn gates are 0 or 1, and weight scales their gradient."""
    p = {name: value.detach().requires_grad_() for name, value in layer.adapter_params().items()}
    w0, x = layer.base.weight, x.detach().requires_grad_()
    base_out = x @ w0.t()
    u = reference_update(layer.config.update, x, x, w0, p, layer.config.scale)
    if layer.config.gate.reads == "input":
        z = x @ p["gate.weight"] + p["gate.bias"]
    else:
        z = base_out @ p["gate.weight"] + u @ p["gate.update_weight"] + p["gate.bias"]
    soft = torch.sigmoid(z)
    g = drawn + weight * (soft - soft.detach())
    y = base_out + g.unsqueeze(-1) * u + (0 if layer.base.bias is None else layer.base.bias)
    grads = torch.autograd.grad(y, [x, *p.values()], dy)
    return y.detach(), dict(zip(["x", *p], grads, strict=True))


def draw(logits):
    return (torch.rand_like(logits) < torch.sigmoid(logits)).to(logits.dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["hira", "lora"])
def test_nan_reaches_the_output(randomize, update, training):
    """A draw that fails would end the run before the loss is looked at."""
    layer = gated_layer(randomize, update).train(training)
    x, _ = layer_inputs(layer, (2, 7), requires_grad=False)
    x[0, 0, 0] = float("nan")
    y = layer(x)
    assert bool(y[0, 0].isnan().all())
    assert not bool(y[0, 1:].isnan().any())


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("layer_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bias", [0.0, -40.0, 40.0], ids=["mixed", "all_closed", "all_open"])
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("update", ALL_UPDATES)
def test_forward_and_gradients_equal_dense_reference(randomize, update, reads, bias, layer_bias, share):
    layer = gated_layer(
        randomize, update, bias=bias, reads=reads, layer_bias=layer_bias, gradient_share=share
    ).train()
    x, dy = layer_inputs(layer, (2, 7))
    logits = []
    layer.set_gate_listener(logits.append)
    torch.manual_seed(5)
    found = actual(layer, x, dy)
    torch.manual_seed(5)
    drawn = draw(logits[0].detach())
    assert {0.0: len(drawn.unique()) == 2, -40.0: not drawn.any(), 40.0: bool(drawn.all())}[bias]
    weight = torch.ones_like(drawn)
    if share < 1:
        weight = torch.zeros(14, dtype=torch.float64)
        weight[torch.randperm(14)[:4]] = 14 / 4
        weight = weight.view(2, 7)
    y, grads = reference(layer, x, dy, drawn, weight)
    torch.testing.assert_close(found[0], y, rtol=0, atol=1e-12)
    for name, gradient in grads.items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("update", ALL_UPDATES)
def test_evaluation_decides(randomize, update, reads):
    layer = gated_layer(randomize, update, reads=reads).eval()
    x, dy = layer_inputs(layer, (2, 7))
    logits = []
    layer.set_gate_listener(logits.append)
    y = layer(x)
    drawn = (torch.sigmoid(logits[0].detach()) > 0.5).double()
    assert len(drawn.unique()) == 2
    torch.testing.assert_close(y.detach(), reference(layer, x, dy, drawn, 1.0)[0], rtol=0, atol=1e-12)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("at_a_time", [1, 3, 60], ids=["one_token", "few_rows", "prefill"])
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("update", ALL_UPDATES)
def test_decoding_with_thresholds_decides_too(randomize, update, reads, at_a_time):
    layer = gated_layer(randomize, update, reads=reads).eval()
    x = layer_inputs(layer, (60,), requires_grad=False)[0]
    if reads == "input":
        with torch.no_grad():
            layer.gate.bias.zero_()
            x[1] = 0  # a logit of exactly 0, which is closed
    with torch.no_grad():
        expected = layer(x)
        with prepared_for_inference(nn.ModuleDict({"one": layer}), skip_below=0.1, merge_above=0.9):
            found = torch.cat([layer(rows.unsqueeze(1)).squeeze(1) for rows in x.split(at_a_time)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    frozen = (expected - layer.base(x)).abs().amax(dim=1) < 1e-12
    assert 0 < int(frozen.sum()) < 60


def test_share_of_open_tokens_is_their_probability():
    gate = HardGateConfig(bias=-1.0).build(3, dtype=torch.float64, device=torch.device("cpu"))
    torch.manual_seed(0)
    values = gate.values(gate(torch.randn(20_000, 3, dtype=torch.float64))).values
    expected = float(torch.sigmoid(torch.tensor(-1.0)))
    assert abs(float(values.mean()) - expected) <= 3 * (expected * (1 - expected) / 20_000) ** 0.5


def test_matmuls_of_step(randomize):
    layer = gated_layer(randomize, gradient_share=1 / 7).train()
    x, _ = layer_inputs(layer, (2, 7))
    logits = []
    layer.set_gate_listener(logits.append)
    torch.manual_seed(5)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    torch.manual_seed(5)
    opened = int(draw(logits[0].detach()).sum())
    large, low_rank, gate = 2 * 10 * 12, 4 * 2 * 10 * 12 * 3, 2 * 2 * 14 * 12
    graded = 2
    assert 0 < opened < 14
    expected = (2 * (14 - opened) + 3 * opened + graded) * large + low_rank
    assert expected <= counter.get_total_flops() <= expected + gate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": float("inf")}, "adapter.gate.bias: inf; accepted: a finite number"),
        (
            {"reads": "inputs"},
            "adapter.gate.reads: 'inputs' is unknown; accepted: input, outputs; did you mean",
        ),
        ({"gradient_share": 0}, "adapter.gate.gradient_share: 0; accepted: a share"),
        ({"sparsity_weight": -1}, "adapter.gate.sparsity_weight: -1; accepted: a number of at least 0"),
    ],
    ids=["bias", "reads", "gradient_share", "sparsity_weight"],
)
def test_invalid_settings_are_named(settings, message):
    assert HardGateConfig(**settings).problems()[0].startswith(message)
