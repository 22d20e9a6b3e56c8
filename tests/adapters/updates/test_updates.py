"""Every update under every gate: forward and all gradients against a dense formula, differentiated by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.kernels.hadamard import add_gated_hadamard
from gatera_lightning.adapters.layer import AdaptedLinear

UPDATES, GATES = ("lora", "dora", "hira"), ("none", "static", "token")
METHODS = list(itertools.product(UPDATES, GATES))
SIZES = [(7, 13, 3), (13, 5, 5)]  # in, out, rank
BATCHES = [(4,), (2, 3)]
# backbone dtype, adapter dtype, tolerance relative to the largest element
DTYPES = {
    "fp32": (torch.float32, "float32", 1e-5),
    "fp64": (torch.float64, "float64", 1e-12),
    "bf16": (torch.bfloat16, "float32", 3e-2),
}


def _layer(update, gate, size=SIZES[0], *, bias=True, dtype=torch.float32, **settings):
    """A fresh adapted layer, B = 0; the same arguments give the same values."""
    size_in, size_out, rank = size
    torch.manual_seed(0)
    base = nn.Linear(size_in, size_out, bias=bias).to(dtype)
    if update != "hira":
        settings.setdefault("alpha", 2.5 * rank)
    config = AdapterConfig(update=update, gate=gate, rank=rank, **settings)
    return AdaptedLinear(base, config, torch.Generator().manual_seed(1))


def _inputs(layer, batch=(2, 3), *, requires_grad=True):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*batch, layer.in_features, generator=generator).to(layer.weight.dtype)
    dy = torch.randn(*batch, layer.out_features, generator=generator).to(layer.weight.dtype)
    return x.requires_grad_(requires_grad), dy


def _reference_update(update, x, dropped, w0, p, scale):
    ba = p["update.b"] @ p["update.a"]
    if update == "lora":
        return scale * dropped @ ba.t()
    if update == "hira":
        return dropped @ (w0 * ba).t()
    ratio = p["update.magnitude"] / torch.linalg.vector_norm(w0 + scale * ba, dim=1).detach()
    return ratio * (x @ w0.t() + scale * dropped @ ba.t()) - x @ w0.t()


def _reference_gate(gate, x, p):
    one = torch.ones(x.shape[:-1], dtype=x.dtype)
    if gate == "none":
        return one
    return torch.sigmoid(p["gate.bias"] * one + (x @ p["gate.weight"] if gate == "token" else 0))


def _reference(layer, x, dy, mask=None):
    """Output and gradients by name in float64, from the very values that ``layer`` holds."""
    update, gate = layer.config.update, layer.config.gate.kind
    p = {n: v.detach().double().requires_grad_() for n, v in layer.adapter_params().items()}
    w0, x = layer.base.weight.double(), x.detach().double().requires_grad_()
    dropped = x if mask is None else x * mask
    u = _reference_update(update, x, dropped, w0, p, layer.config.scale)
    y = x @ w0.t() + _reference_gate(gate, x, p).unsqueeze(-1) * u
    if layer.base.bias is not None:
        y = y + layer.base.bias.double()
    grads = torch.autograd.grad(y, [x, *p.values()], dy.double())
    return y.detach(), dict(zip(["x", *p], grads, strict=True))


def _actual(layer, x, dy):
    y = layer(x)
    y.backward(dy)
    grads = {n: v.grad for n, v in layer.adapter_params().items()}
    return y.detach(), grads | ({"x": x.grad} if x.requires_grad else {})


def _assert_close(name, actual, expected, tol, size=None):
    assert actual.shape == expected.shape, name
    error, size = (actual.double() - expected).abs().max().item(), size or expected.abs().max().item()
    assert size > 1e-3, f"{name}: the reference is all zero, the comparison would prove nothing"
    assert error <= tol * size, f"{name}: off by {error:.2e} where the largest element is {size:.2e}"


def _assert_all_close(actual, expected, tol):
    _assert_close("y", actual[0], expected[0], tol)
    assert set(actual[1]) == set(expected[1])
    # The gate bias sums what the gate weight weighs: where that cancels, the weight's gradient gives the size.
    gate_size = max(
        [g.abs().max().item() for n, g in expected[1].items() if n.startswith("gate")], default=None
    )
    for name, gradient in expected[1].items():
        _assert_close(
            f"d{name}", actual[1][name], gradient, tol, gate_size if name.startswith("gate") else None
        )


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_forward_and_every_gradient_equal_the_dense_formula(randomise, update, gate, kind, bias, size, batch):
    dtype, adapter_dtype, tol = DTYPES[kind]
    layer = randomise(_layer(update, gate, size, bias=bias, dtype=dtype, adapter_dtype=adapter_dtype))
    x, dy = _inputs(layer, batch)
    expected_names = {"update.a", "update.b"}
    expected_names |= {"update.magnitude"} if update == "dora" else set()
    expected_names |= {"none": set(), "static": {"gate.bias"}, "token": {"gate.bias", "gate.weight"}}[gate]
    assert set(layer.adapter_params()) == expected_names
    y, grads = _actual(layer, x, dy)
    _assert_all_close((y, grads), _reference(layer, x, dy), tol)
    assert y.dtype == x.grad.dtype == dtype
    assert {grads[n].dtype for n in expected_names} == {getattr(torch, adapter_dtype)}
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_step_zero_is_the_frozen_layer(update, gate, bias, kind):
    dtype, adapter_dtype, _ = DTYPES[kind]
    layer = _layer(update, gate, bias=bias, dtype=dtype, adapter_dtype=adapter_dtype, **({} if gate == "none" else {"gate": GATES_BY_KIND}))
    x, _ = _inputs(layer)
    y, frozen = layer(x), layer.base(x)
    if update != "dora" or not bias:
        assert torch.equal(y, frozen)
    else:  # DoRA adds the bias after rescaling, where F.linear may fuse it with the product: one more rounding
        assert (y - frozen).abs().max() <= 2 * torch.finfo(dtype).eps * frozen.abs().max()
        assert torch.equal(y, F.linear(x, layer.base.weight) + layer.base.bias)


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_initial_values(update, gate):
    layer = _layer(update, gate, (64, 48, 8), **({} if gate == "none" else {"gate": GATES_BY_KIND}))
    bound = 1 / 64**0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < layer.update.a.abs().max() <= bound
    assert not layer.update.b.any()
    if gate == "token":
        assert not layer.gate.weight.any()
    if gate != "none":
        assert layer.gate.bias.tolist() == [-2.0]
    if update == "dora":
        torch.testing.assert_close(layer.update.magnitude.detach(), layer.base.weight.norm(dim=1))


@pytest.mark.parametrize("gate", ["static", "token"])
@pytest.mark.parametrize("update", UPDATES)
def test_an_open_gate_is_the_ungated_method(randomise, update, gate):
    gated, ungated = randomise(_layer(update, gate)), randomise(_layer(update, "none"))
    with torch.no_grad():
        gated.gate.bias.fill_(40)  # sigmoid(40 + w·x) is 1 in float32
        for name, parameter in ungated.adapter_params().items():
            parameter.copy_(gated.adapter_params()[name])
    (x, dy), (x_, _) = _inputs(gated), _inputs(ungated)
    (y, grads), (y_, grads_) = _actual(gated, x, dy), _actual(ungated, x_, dy)
    torch.testing.assert_close(y, y_)
    for name, gradient in grads_.items():
        torch.testing.assert_close(grads[name], gradient)
    assert grads["gate.bias"].abs().item() < 1e-12


@pytest.mark.parametrize("gate", ["static", "token"])
@pytest.mark.parametrize("update", UPDATES)
def test_a_closed_gate_is_the_frozen_layer(randomise, update, gate):
    layer = randomise(_layer(update, gate))
    with torch.no_grad():
        layer.gate.bias.fill_(-60)
    x, dy = _inputs(layer)
    y, grads = _actual(layer, x, dy)
    torch.testing.assert_close(y, layer.base(x))
    assert all(gradient.abs().max() < 1e-12 for name, gradient in grads.items() if name != "x")


@pytest.mark.parametrize("kind", ["fp32", "fp64"])
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_dropout_acts_on_the_input_of_the_update_alone(randomise, update, gate, kind):
    dtype, adapter_dtype, tol = DTYPES[kind]
    layer = randomise(_layer(update, gate, dropout=0.5, dtype=dtype, adapter_dtype=adapter_dtype)).train()
    x, dy = _inputs(layer)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.5)  # 0 or 2
    assert {0.0, 2.0} == set(mask.unique().tolist())
    torch.manual_seed(5)
    actual = _actual(layer, x, dy)
    _assert_all_close(actual, _reference(layer, x, dy, mask.double()), tol)


@pytest.mark.parametrize("update", UPDATES)
def test_no_dropout_in_evaluation(randomise, update):
    layer = randomise(_layer(update, "token", dropout=0.5)).eval()
    x, dy = _inputs(layer)
    _assert_all_close(_actual(layer, x, dy), _reference(layer, x, dy), 1e-5)


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_an_input_that_needs_no_gradient(randomise, update, gate):
    layer = randomise(_layer(update, gate))
    x, dy = _inputs(layer, requires_grad=False)
    y, grads = _actual(layer, x, dy)
    expected_y, expected = _reference(layer, x, dy)
    expected.pop("x")
    _assert_all_close((y, grads), (expected_y, expected), 1e-5)
    assert x.grad is None


@pytest.mark.parametrize("trained", ["update.a", "update.b", "gate"])
def test_only_some_parameters_need_a_gradient(randomise, trained):
    layer = randomise(_layer("hira", "token"))
    for name, parameter in layer.adapter_params().items():
        parameter.requires_grad_(name.startswith(trained))
    x, dy = _inputs(layer)
    _, grads = _actual(layer, x, dy)
    _, expected = _reference(layer, x, dy)
    for name in expected:
        if name == "x" or name.startswith(trained):
            _assert_close(f"d{name}", grads[name], expected[name], 1e-5)
        else:
            assert grads[name] is None


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_strided_input_and_expanded_gradient(randomise, update, gate):
    layer = randomise(_layer(update, gate))
    x = _inputs(layer, (3, 2))[0].detach().transpose(0, 1).requires_grad_()
    dy = torch.full((1, 1, 1), 0.7).expand(2, 3, layer.out_features)
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    _assert_all_close(_actual(layer, x, dy), _reference(layer, x, dy), 1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_autocast_over_a_float32_backbone(randomise, update, gate, x_dtype):
    layer = randomise(_layer(update, gate))
    x, dy = _inputs(layer)
    x = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    grads = {n: p.grad for n, p in layer.adapter_params().items()} | {"x": x.grad}
    assert x.grad.dtype == x_dtype
    _assert_all_close((y.detach(), grads), _reference(layer, x, dy), 3e-2)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_logit_of_the_token_gate_is_exact_to_float32(randomise, kind, autocast):
    layer = randomise(_layer("hira", "token", dtype=DTYPES[kind][0]))
    x, _ = _inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = layer.gate(x)
    assert z.dtype == torch.float32
    _assert_close(
        "z", z.detach(), x.detach().double() @ layer.gate.weight.double() + layer.gate.bias.double(), 1e-6
    )


def test_autocast_leaves_the_hadamard_update_in_the_dtype_of_the_frozen_weight(randomise):
    layer = randomise(_layer("hira", "none"))
    x, dy = _inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = add_gated_hadamard(torch.zeros_like(dy), x, layer.weight, layer.update.a, layer.update.b)
    u.backward(dy)
    dense = layer.weight.double() * (layer.update.b.double() @ layer.update.a.double())
    _assert_close("u", u.detach(), x.detach().double() @ dense.t(), 1e-5)
    _assert_close("dx", x.grad, dy.double() @ dense, 1e-5)


@pytest.mark.parametrize(
    ("kind", "dropout", "training", "products"),
    [("fp32", 0.0, True, 3), ("bf16", 0.0, True, 5), ("fp32", 0.5, True, 5), ("fp32", 0.0, False, 5)],
)
def test_ungated_hira_multiplies_by_the_merged_weight_where_rounding_forgives_it(
    randomise, kind, dropout, training, products
):
    layer = randomise(_layer("hira", "none", dtype=DTYPES[kind][0], dropout=dropout)).train(training)
    x, dy = _inputs(layer)
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(dy)
    size, factors = layer.weight.numel(), 4 * 2 * 3 * layer.weight.numel()  # B A twice, dA and dB
    assert counter.get_total_flops() == products * 2 * 6 * size + factors


@pytest.mark.parametrize(
    ("gate", "settings"),
    [*((gate, {}) for gate in GATES), ("token", {"skip_below": 0.4, "merge_above": 0.6})],
    ids=str,
)
def test_the_output_may_be_written_to(randomise, gate, settings):
    """Models clamp queries and keys in place (OLMo)."""
    layer = randomise(_layer("hira", gate, **settings))
    x, dy = _inputs(layer)
    layer(x).clamp_(-0.1, 0.1).backward(dy)
    found = x.grad
    x.grad = None
    layer(x).clamp(-0.1, 0.1).backward(dy)
    assert torch.equal(found, x.grad)


def test_validation_within_training_is_evaluation(randomise):
    layer = randomise(_layer("hira", "none"))
    x, _ = _inputs(layer)
    with torch.no_grad():
        assert torch.equal(layer.train()(x), layer.eval()(x))


def test_autocast_does_not_round_the_merged_weight(randomise):
    layer = randomise(_layer("hira", "none"))
    x, _ = _inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = layer.train()(x)
        assert torch.equal(merged, layer.eval()(x))


@pytest.mark.parametrize("update", ["lora", "dora"])
def test_alpha_is_divided_by_the_rank(randomise, update):
    size = (7, 13, 4)
    halved, one = (randomise(_layer(update, "none", size, alpha=alpha)) for alpha in (2.0, None))
    assert (halved.update.scale, one.update.scale) == (0.5, 1.0)
    x, _ = _inputs(one)
    with torch.no_grad():
        one.update.b.mul_(0.5)
    torch.testing.assert_close(halved(x), one(x))


@pytest.mark.parametrize("gate", GATES)
def test_dora_leaves_a_zero_row_of_the_frozen_weight_finite(gate):
    base = nn.Linear(7, 13)
    with torch.no_grad():
        base.weight[4] = 0
    layer = AdaptedLinear(base, AdapterConfig(update="dora", gate=gate, rank=3))
    x, dy = _inputs(layer)
    y, grads = _actual(layer, x, dy)
    torch.testing.assert_close(y, base(x))
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize("update", UPDATES)
def test_delta_weight_is_what_the_update_applies(randomise, update):
    layer = randomise(_layer(update, "none", dtype=torch.float64, adapter_dtype="float64", bias=False))
    x, _ = _inputs(layer)
    expected = layer(x) - layer.base(x)
    torch.testing.assert_close(
        F.linear(x, layer.update.delta_weight(layer.weight)), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_one_token_without_a_batch(update, gate):
    """As nn.Linear takes it."""
    layer = _layer(update, gate)
    x, _ = _inputs(layer)
    token = x.detach()[0, 0].clone().requires_grad_()
    y = layer(token)
    assert torch.allclose(y, layer(x)[0, 0], atol=1e-6)
    y.sum().backward()
    assert token.grad.shape == token.shape
