import pytest
import torch

from gatera_lightning.objectives import total_variation as file
from gatera_lightning.objectives.total_variation import (
    compare_hidden,
    linear_total_variation,
    total_variation,
)


@pytest.mark.parametrize("rows_per_chunk", [100, 3, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_equal_autograd(monkeypatch, rows_per_chunk, bias):
    monkeypatch.setattr(file, "LOGITS_PER_CHUNK", rows_per_chunk * 11)
    torch.manual_seed(0)
    hidden, expected = torch.randn(2, 7, 5, dtype=torch.float64).unbind()
    hidden.requires_grad_()
    weight, shift = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    shift = shift if bias else None
    p, q = (torch.nn.functional.linear(rows, weight, shift).softmax(-1) for rows in (hidden, expected))
    reference = (p - q).abs().sum() / 2
    found = linear_total_variation(hidden, expected, weight, shift)
    assert float(found) == pytest.approx(float(reference), abs=1e-12)
    ours, theirs = (torch.autograd.grad(3 * value, hidden)[0] for value in (found, reference))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    compared = compare_hidden(hidden.detach(), expected, weight, shift)
    torch.testing.assert_close(compared[:, 0], (p - q).abs().sum(1).detach() / 2)
    assert compared[:, 1].tolist() == (p.argmax(1) == q.argmax(1)).double().tolist()


def test_equal_predictions_have_no_distance_and_no_gradient():
    hidden = torch.randn(4, 5, requires_grad=True)
    weight = torch.randn(11, 5)
    loss = linear_total_variation(hidden, hidden.detach(), weight, None)
    loss.backward()
    assert float(loss) == 0
    assert not hidden.grad.any()
    assert float(total_variation(hidden @ weight.T, hidden @ weight.T)) == 0


def test_no_rows_give_zero_that_is_part_of_the_graph():
    hidden = torch.empty(0, 5, requires_grad=True)
    loss = linear_total_variation(hidden, torch.empty(0, 5), torch.randn(11, 5), None)
    loss.backward()
    assert float(loss) == 0
    assert hidden.grad.shape == (0, 5)
