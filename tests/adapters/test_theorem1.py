"""Theorem 1 of GateRA: the gate scales the gradient, ``dL/dP = g(x) · W0 ⊙ (dL/dy xᵀ)`` for ``P = BA``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.layer import AdaptedLinear

SIZES = st.integers(1, 9)


def _one_token(size_in, size_out, rank, logit, spread, seed):
    """Return a float64 layer, a token x (1, in) whose gate has the given logit, and dL/dy (1, out)."""
    torch.manual_seed(seed)
    base = nn.Linear(size_in, size_out).double()
    layer = AdaptedLinear(base, AdapterConfig(rank=min(rank, size_in, size_out), adapter_dtype="float64"))
    x, dy = spread * torch.randn(1, size_in).double(), torch.randn(1, size_out).double()
    with torch.no_grad():
        base.weight.mul_(spread)
        layer.update.a.normal_()
        layer.update.b.normal_()
        layer.gate.weight.normal_()
        layer.gate.bias.fill_(logit).sub_(x[0] @ layer.gate.weight)
    layer(x).backward(dy)
    return layer, x, dy


def _reference_dp(layer, x, dy, logit):
    g = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
    return g, g * layer.base.weight * (dy.t() @ x)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(SIZES, SIZES, SIZES, st.floats(-20, 20), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**32 - 1))
def test_gate_bounds_gradients(size_in, size_out, rank, logit, spread, seed):
    layer, x, dy = _one_token(size_in, size_out, rank, logit, spread, seed)
    g, dp = _reference_dp(layer, x, dy, logit)
    a, b = layer.update.a, layer.update.b
    bound = g * layer.base.weight.abs().max() * dy.norm() * x.norm()
    rounding = 1 + 1e-9
    assert dp.norm() <= bound * rounding
    assert b.grad.norm() <= bound * torch.linalg.matrix_norm(a, 2) * rounding
    assert a.grad.norm() <= bound * torch.linalg.matrix_norm(b, 2) * rounding
    close = {"rtol": 1e-9, "atol": 1e-12 * bound.item()}
    torch.testing.assert_close(b.grad, dp @ a.detach().t(), **close)
    torch.testing.assert_close(a.grad, b.detach().t() @ dp, **close)


@pytest.mark.parametrize("logit", [-9.0, -1.0, 0.0, 2.0])
def test_bound_is_attained(logit):
    torch.manual_seed(0)
    layer = AdaptedLinear(
        nn.Linear(7, 5).double(),
        AdapterConfig(rank=1, adapter_dtype="float64", gate=TokenGateConfig(bias=logit)),
    )
    x, dy = torch.randn(1, 7).double(), torch.randn(1, 5).double()
    with (
        torch.no_grad()
    ):  # constant W0 and A parallel to x turn every inequality of the proof into an equality
        layer.base.weight.fill_(0.3)
        layer.update.a.copy_(2 * x)
    layer(x).backward(dy)
    g = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
    bound = g * 0.3 * dy.norm() * x.norm() * layer.update.a.detach().norm()
    torch.testing.assert_close(layer.update.b.grad.norm(), bound, rtol=1e-12, atol=0)


def test_ungated_gradient_exceeds_bound():
    layer, x, dy = _one_token(7, 5, 3, -6.0, 1.0, seed=0)
    g, dp = _reference_dp(layer, x, dy, -6.0)
    ungated = (dp / g @ layer.update.a.detach().t()).norm()
    bound = (
        g * layer.base.weight.abs().max() * dy.norm() * x.norm() * torch.linalg.matrix_norm(layer.update.a, 2)
    )
    assert layer.update.b.grad.norm() <= bound < ungated
