"""Stochastic rounding of the merged weight: its mean, its neighbors, and a layer that trains with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig, inject_adapters, load_adapter, save_adapter
from gatera_lightning.adapters.gates import HardGateConfig, TokenGateConfig
from gatera_lightning.adapters.kernels.hadamard import hadamard_weight
from gatera_lightning.adapters.kernels.stochastic_rounding import draw_rounding, stochastically_rounded_sum
from gatera_lightning.adapters.layer import AdaptedLinear

OUT, IN, RANK = 10, 12, 3


@pytest.fixture
def matrices():
    """A weight in bfloat16, and a change of which rounding to nearest keeps almost nothing."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN).bfloat16()
    return weight, (weight.float() * 1e-3 * torch.randn(OUT, IN)).bfloat16()


def adapted(gate="none", *, scale=1e-3, **settings):
    torch.manual_seed(0)
    config = AdapterConfig(rank=RANK, gate=gate, **{"stochastic_rounding": True} | settings)
    layer = AdaptedLinear(nn.Linear(IN, OUT).bfloat16(), config).train()
    with torch.no_grad():
        layer.update.b.normal_().mul_(scale)
    return layer, torch.randn(2, 4, IN).bfloat16().requires_grad_()


def exact_weight(layer):
    weight = layer.base.weight
    return weight.double() + hadamard_weight(weight, layer.update.a, layer.update.b).double()


def within_three_standard_errors(draws, expected):
    """Compare the mean over the first dimension; 1 in 370 of independent entries would be outside."""
    errors = (draws.mean(0) - expected).abs()
    limits = 3 * draws.std(0) / len(draws) ** 0.5
    return (errors > limits + 1e-15).double().mean() <= 0.03


def test_mean_over_draws_is_exact_sum(matrices):
    weight, delta = matrices
    torch.manual_seed(1)
    draws = torch.stack([stochastically_rounded_sum(*matrices, draw_rounding(weight)) for _ in range(2000)])
    exact = weight.double() + delta.double()
    assert within_three_standard_errors(draws.double(), exact)
    nearest = (weight + delta).double()
    assert (nearest - exact).abs().mean() > 10 * (draws.double().mean(0) - exact).abs().mean()


def test_product_has_variance_of_independent_draws(matrices):
    """Entries of a row share one random integer, and yet any two are independent."""
    torch.manual_seed(1)
    draws = torch.stack(
        [stochastically_rounded_sum(*matrices, draw_rounding(matrices[0])) for _ in range(4000)]
    )
    x = torch.randn(IN, dtype=torch.float64)
    found = (draws.double() @ x).var(0)
    independent = draws.double().var(0) @ x**2
    torch.testing.assert_close(found, independent, rtol=0.15, atol=0)


def test_result_is_a_neighbor_and_exact_sums_stay(matrices):
    weight, delta = matrices
    torch.manual_seed(1)
    draws = torch.stack([stochastically_rounded_sum(*matrices, draw_rounding(weight)) for _ in range(200)])
    exact = weight.double() + delta.double()
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)  # 8 significant bits
    assert bool(((draws.double() - exact).abs() < spacing).all())
    assert torch.equal(stochastically_rounded_sum(weight, weight, draw_rounding(weight)), 2 * weight)
    special = torch.tensor([[float("inf"), float("-inf"), float("nan"), 0.0]]).bfloat16()
    same = stochastically_rounded_sum(special, torch.zeros_like(special), draw_rounding(special))
    torch.testing.assert_close(same, special, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "gate", ["none", HardGateConfig(bias=99.0), TokenGateConfig(bias=9.0, merge_above=0.9)]
)
def test_open_tokens_take_three_matmuls_with_right_mean(gate):
    layer, x = adapted(gate)
    share = 1 if isinstance(gate, HardGateConfig) else 0  # its gradient takes one more
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    large = 2 * OUT * IN
    assert counter.get_total_flops() == (3 + share) * 8 * large + 4 * RANK * large
    torch.manual_seed(1)
    with torch.no_grad():
        layer.base.bias.zero_()
    rows = torch.eye(IN).bfloat16()  # the outputs are the rounded weights
    draws = torch.stack([layer(rows).detach() for _ in range(2000)]).double()
    assert within_three_standard_errors(draws, exact_weight(layer).t())


def test_backward_uses_the_weight_of_forward():
    layer, x = adapted(scale=0.05)
    dy = torch.randn(2, 4, OUT).bfloat16()
    torch.manual_seed(5)
    y = layer(x)
    y.backward(dy)
    torch.manual_seed(5)
    w0, (a, b) = layer.base.weight, layer.update.factors()
    rounded = stochastically_rounded_sum(w0, hadamard_weight(w0, a, b), draw_rounding(w0))
    assert torch.equal(y, F.linear(x, rounded, layer.base.bias))
    assert torch.equal(x.grad, dy @ rounded)
    dp = w0.double() * (dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double())
    torch.testing.assert_close(a.grad.double(), b.double().t() @ dp, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(b.grad.double(), dp @ a.double().t(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("gate", ["none", HardGateConfig(bias=99.0)])
def test_without_it_open_tokens_are_exact_in_16_bits(gate):
    """Rounding to nearest would lose the whole update."""
    layer, x = adapted(gate, stochastic_rounding=False)
    update = layer(x) - layer.base(x)
    expected = F.linear(x.double(), exact_weight(layer) - layer.base.weight.double())
    assert bool(expected.abs().max() > 1e-4)
    nearest = F.linear(x, exact_weight(layer).bfloat16(), layer.base.bias) - layer.base(x)
    assert (update.double() - expected).norm() < (nearest.double() - expected).norm()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    large = 2 * OUT * IN
    share = 0 if gate == "none" else 1
    assert counter.get_total_flops() >= (5 + share - 1) * 8 * large


def test_other_dtypes_are_not_rounded():
    torch.manual_seed(0)
    config = AdapterConfig(rank=RANK, gate="none", stochastic_rounding=True)
    layer = AdaptedLinear(nn.Linear(IN, OUT), config).train()
    state = torch.get_rng_state()
    layer(torch.randn(2, IN, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())


def test_updates_without_merged_weight_refuse_it():
    (problem,) = AdapterConfig(update="lora", stochastic_rounding=True).problems()
    assert "adapter.stochastic_rounding: True, but update 'lora' has no merged weight" in problem
    assert "accepted: false, or update hira or block_hira" in problem
    assert AdapterConfig(stochastic_rounding=1).problems()


@pytest.mark.parametrize(
    ("gate", "settings", "accepted"),
    [
        ("none", {}, True),
        ("static", {}, True),
        ("hard", {}, True),
        (TokenGateConfig(skip_below=0.1, merge_above=0.9), {}, True),
        ("token", {}, False),
        ("threshold", {}, False),
        ("position", {}, False),
        ("none", {"dropout": 0.1}, False),
    ],
)
def test_rounding_without_effect_is_refused(gate, settings, accepted):
    problems = AdapterConfig(gate=gate, stochastic_rounding=True, **settings).problems()
    assert [problem.partition(":")[0] for problem in problems] == (
        [] if accepted else ["adapter.stochastic_rounding"]
    )


def test_adapter_loads_whatever_its_steps_rounded(tiny_llama, tmp_path):
    """The setting changes training steps, and not what a trained adapter computes."""
    for rounding in (True, False):
        model = tiny_llama()
        inject_adapters(model, AdapterConfig(rank=RANK, gate="none", stochastic_rounding=rounding))
        if rounding:
            save_adapter(model, tmp_path)
    assert load_adapter(model, tmp_path).stochastic_rounding
