"""Gradients of rounded gates: exact for every token, unbiased for a share."""

import pytest
import torch

from gatera_lightning.adapters.gates.straight_through import share_problem, straight_through


def rounded_and_soft(tokens=13):
    soft = torch.linspace(0.1, 0.9, tokens, dtype=torch.float64, requires_grad=True)
    return (soft.detach() > 0.5).double(), soft


def test_every_token_passes_its_gradient():
    rounded, soft = rounded_and_soft()
    values, graded = straight_through(rounded.view(13, 1), soft.view(13, 1), 1.0)
    assert torch.equal(values, rounded.view(13, 1))
    assert graded.tolist() == list(range(13))
    weight = torch.arange(13.0, dtype=torch.float64)
    (values.flatten() * weight).sum().backward()
    assert torch.equal(soft.grad, weight)


@pytest.mark.parametrize(("share", "drawn"), [(1 / 8, 2), (0.5, 7), (1e-9, 1)])
def test_share_draws_tokens_without_replacement(share, drawn):
    torch.manual_seed(0)
    rounded, soft = rounded_and_soft()
    values, graded = straight_through(rounded, soft, share)
    assert torch.equal(values, rounded)
    assert len(graded) == len(set(graded.tolist())) == drawn
    values.sum().backward()
    assert soft.grad.nonzero().flatten().tolist() == sorted(graded.tolist())
    torch.testing.assert_close(soft.grad[graded], torch.full((drawn,), 13 / drawn, dtype=torch.float64))


def test_gradient_of_share_is_unbiased():
    torch.manual_seed(0)
    rounded, soft = rounded_and_soft()
    dy = torch.randn(13, dtype=torch.float64)
    draws = []
    for _ in range(2000):
        values, _ = straight_through(rounded, soft, 1 / 4)
        draws.append(torch.autograd.grad(values, soft, dy)[0])
    draws = torch.stack(draws)
    error = (draws.mean(0) - dy).abs()
    assert bool((error <= 3 * draws.std(0) / 2000**0.5 + 1e-12).float().mean() > 0.9)
    total = draws.sum(1)
    assert float((total.mean() - dy.sum()).abs()) <= 3 * float(total.std()) / 2000**0.5


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), True, "1/8", None])
def test_other_shares_are_refused(share):
    assert share_problem(share)[0].startswith(f"adapter.gate.gradient_share: {share!r}; accepted: a share")
