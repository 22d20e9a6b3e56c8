"""Tokens with saturated gates: output, gradients, matmuls and error bound."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.kernels.saturated_gates import hard_gates, partitioned_hadamard, tokens_by_gate
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapter_parameters

IN, OUT, RANK = 12, 10, 3
LOGITS = {
    "every kind": [-8, -8, 8, 8, 0, 1, -1, 8],
    "none open": [-8, -8, -8, 0, 1, -1, 0, -8],
    "none closed": [8, 0, 8, 1, 8, 8, 0, 1],
    "all closed": [-8] * 8,
    "all open": [8] * 8,
    "none saturated": [0, 1, -1, 0, 1, 2, -2, 0],
}


def layer_with(logits, *, skip_below=0.1, merge_above=0.9, dtype=torch.float64, bias=True):
    """Return an adapted layer and an input whose first feature sets each token's gate."""
    torch.manual_seed(0)
    kind = "float64" if dtype == torch.float64 else "float32"
    gate = TokenGateConfig(skip_below=skip_below, merge_above=merge_above)
    config = AdapterConfig(rank=RANK, gate=gate, adapter_dtype=kind)
    layer = AdaptedLinear(nn.Linear(IN, OUT, bias=bias).to(dtype), config)
    x = torch.randn(2, 4, IN, dtype=dtype)
    x[..., 0] = torch.tensor(logits, dtype=dtype).view(2, 4)
    with torch.no_grad():
        layer.update.b.normal_()
        layer.gate.weight.zero_()[0] = 1.0
    return layer.train(), x.requires_grad_()


def reference(layer, x, dy):
    """Compute output and gradients by name with hard gates, in float64 by autograd."""
    p = {name: value.detach().double().requires_grad_() for name, value in layer.adapter_params().items()}
    w0, x = layer.base.weight.double(), x.detach().double().requires_grad_()
    g = torch.sigmoid(x @ p["gate.weight"] + p["gate.bias"])
    skip_below, merge_above = layer.config.gate.thresholds
    hard = torch.where(g < skip_below, 0.0, torch.where(g > merge_above, 1.0, g))
    bias = 0 if layer.base.bias is None else layer.base.bias.double()
    y = x @ w0.t() + bias + hard.unsqueeze(-1) * (x @ (w0 * (p["update.b"] @ p["update.a"])).t())
    grads = torch.autograd.grad(y, [x, *p.values()], dy.double(), materialize_grads=True)
    return y.detach(), dict(zip(["x", *p], grads, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_forward_and_gradients_equal_hard_gates(logits, dtype, tol, bias):
    layer, x = layer_with(logits, dtype=dtype, bias=bias)
    dy = torch.randn(2, 4, OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    y.backward(dy)
    expected, gradients = reference(layer, x, dy)
    assert y.dtype == dtype
    actual = {name: p.grad for name, p in layer.adapter_params().items()} | {"x": x.grad}
    for name, wanted, found in [("y", expected, y), *((n, gradients[n], actual[n]) for n in gradients)]:
        size = max(1.0, float(wanted.abs().max()))
        assert found is not None, name
        assert float((found.double() - wanted).abs().max()) <= tol * size, name


def test_neutral_thresholds_are_exact():
    layer, x = layer_with(LOGITS["every kind"], skip_below=0.0, merge_above=1.0)
    exact, _ = layer_with(LOGITS["every kind"])
    assert torch.equal(layer(x), exact.eval()(x))


def test_evaluation_ignores_thresholds():
    layer, x = layer_with(LOGITS["every kind"])
    dense = layer.base(x) + torch.sigmoid(layer.gate(x)).unsqueeze(-1) * F.linear(
        x, layer.update.delta_weight(layer.weight)
    )
    assert torch.allclose(layer.eval()(x), dense, atol=1e-12)
    assert not torch.allclose(layer.train()(x), dense, atol=1e-6)
    with torch.no_grad():  # validation during training
        assert torch.allclose(layer(x), dense, atol=1e-12)


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_output_error_is_within_bound(logits):
    layer, x = layer_with(logits)
    u = F.linear(x, layer.update.delta_weight(layer.weight))
    error = (layer(x) - layer.eval()(x)).norm(dim=-1)
    assert bool((error <= 0.1 * u.norm(dim=-1) + 1e-12).all())


@pytest.mark.parametrize(
    ("logits", "closed", "between", "opened"), [("every kind", 2, 3, 3), ("none open", 4, 4, 0)]
)
def test_matmuls_of_step(logits, closed, between, opened):
    layer, x = layer_with(LOGITS[logits])
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    large, low_rank = 2 * OUT * IN, 2 * OUT * IN * RANK  # per token; per BA or factor gradient
    assert counter.get_total_flops() == (2 * closed + 5 * between + 3 * opened) * large + 4 * low_rank


def test_closed_tokens_skip_update():
    layer, x = layer_with(LOGITS["all closed"])
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 8 * 2 * OUT * IN
    assert not layer.update.a.grad.any()


def test_gate_on_threshold_is_not_saturated():
    hard = hard_gates(torch.tensor([0.05, 0.1, 0.5, 0.9, 0.95]), 0.1, 0.9)
    assert torch.equal(hard, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]))
    order, inverse, closed, not_open = tokens_by_gate(hard.flip(0))
    assert (order.tolist(), inverse.tolist(), closed, not_open) == ([4, 1, 2, 3, 0], [4, 1, 2, 3, 0], 1, 4)


def test_few_saturated_tokens_are_not_sorted():
    gates = torch.full((16,), 0.5)
    gates[3] = 0.0
    assert tokens_by_gate(gates) is None
    gates[4] = 1.0
    order, inverse, closed, not_open = tokens_by_gate(gates)
    assert (order[0], order[-1], closed, not_open) == (3, 4, 1, 15)
    assert torch.equal(order[inverse], torch.arange(16))


def test_nan_gate_is_preserved():
    layer, x = layer_with([float("nan"), -8, -8, 8, 8, 0, -8, 8])
    with torch.no_grad():
        x.nan_to_num_(nan=1.0)
        layer.gate.weight.zero_()[1] = float("nan")
    assert bool(layer(x).isnan().all())
    assert torch.equal(
        hard_gates(torch.tensor([float("nan"), 0.0]), 0.1, 0.9).isnan(), torch.tensor([True, False])
    )


def test_output_of_token_does_not_depend_on_batch():
    layer, _ = layer_with(LOGITS["every kind"])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, IN, generator=generator, dtype=torch.float64)
    g = torch.full((32,), 0.5, dtype=torch.float64)
    g[:3], g[3] = 0.01, 0.99  # an eighth of all tokens, a quarter of the first half
    arguments = (layer.base.weight, layer.base.bias, layer.update.a, layer.update.b)
    together = partitioned_hadamard(x, *arguments, hard_gates(g, 0.1, 0.9))
    halves = [
        partitioned_hadamard(part, *arguments, hard_gates(gates, 0.1, 0.9))
        for part, gates in zip(x.split(16), g.split(16), strict=True)
    ]
    alone = [
        partitioned_hadamard(x[n : n + 1], *arguments, hard_gates(g[n : n + 1], 0.1, 0.9)) for n in range(32)
    ]
    g[2] = 0.5  # less than an eighth: not sorted
    unsorted_ = partitioned_hadamard(x, *arguments, hard_gates(g, 0.1, 0.9))
    for other in (torch.cat(halves), torch.cat(alone)):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([unsorted_[:2], unsorted_[3:]]), torch.cat([together[:2], together[3:]]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_gradient_is_close_to_exact(tiny_llama, checkpointing):
    def gradient(**settings):
        model = tiny_llama(torch.float64)
        inject_adapters(
            model,
            AdapterConfig(rank=4, adapter_dtype="float64", **settings),
            torch.Generator().manual_seed(0),
        )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter_parameters(model).items():
                if name.endswith(("update.b", "gate.weight")):
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
                    )
        ids = torch.arange(24).reshape(2, 12)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        updates = [p.grad.flatten() for n, p in adapter_parameters(model).items() if ".update." in n]
        return float(loss), torch.cat(updates)

    exact = gradient()
    narrow, wide = (
        gradient(gate=TokenGateConfig(skip_below=skip, merge_above=merge))
        for skip, merge in ((0.02, 0.98), (0.2, 0.8))
    )
    cosines = [float(F.cosine_similarity(exact[1], g, dim=0)) for _, g in (narrow, wide)]
    assert abs(narrow[0] - exact[0]) < 0.01 * exact[0]
    assert 0.99 < cosines[0] < 1 - 1e-9
    assert cosines[1] < cosines[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
def test_dtype_of_output_does_not_depend_on_gates(dtype, autocast):
    def run(logits):
        layer, x = layer_with(LOGITS[logits], dtype=dtype)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            y, frozen = layer(x), layer.base(x)
        y.float().sum().backward()
        assert x.grad.dtype == dtype
        assert torch.allclose(y.float(), exact(layer, x).float(), rtol=0.1, atol=0.1)
        return y.dtype, frozen.dtype

    def exact(layer, x):
        layer.gate.set_thresholds(0.0, 1.0)
        with torch.no_grad():
            return layer.double()(x.double())

    assert len({kind for logits in LOGITS for kind in run(logits)}) == 1
