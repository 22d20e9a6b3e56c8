"""torch.func transforms agree with autograd, and a second derivative is exact or refused."""

import pytest
import torch
from adapted_layers import METHODS, adapted_layer, layer_inputs
from torch.func import functional_call, grad, jvp, vmap

from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.objectives.linear_cross_entropy import linear_cross_entropy

THRESHOLDS = ("hira", TokenGateConfig(skip_below=0.4, merge_above=0.6))
FUSED = [(update, gate) for update, gate in METHODS if update == "hira" or gate == "token"] + [THRESHOLDS]
PLAIN = [(update, gate) for update, gate in METHODS if (update, gate) not in FUSED]


def _layer(update, gate, randomize):
    return randomize(adapted_layer(update, gate, dtype=torch.float64, adapter_dtype="float64"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_func_transforms_agree_with_autograd(randomize, update, gate, training):
    layer = _layer(update, gate, randomize).train(training)
    x, dy = layer_inputs(layer)
    y = layer(x)
    y.backward(dy)
    own = {name: parameter.detach() for name, parameter in layer.adapter_params().items()}
    found = grad(lambda values: (functional_call(layer, values, (x.detach(),)) * dy).sum())(own)
    for name, parameter in layer.adapter_params().items():
        torch.testing.assert_close(found[name], parameter.grad)
    torch.testing.assert_close(vmap(layer)(x.detach()), y.detach())
    _, slope = jvp(layer, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close((slope * dy).sum(), x.grad.sum())


@pytest.mark.parametrize(("update", "gate"), FUSED, ids=str)
def test_second_derivative_of_fused_operation_is_refused(randomize, update, gate):
    layer = _layer(update, gate, randomize)
    own = list(layer.adapter_params().values())
    y = layer(layer_inputs(layer)[0])
    with pytest.raises(RuntimeError, match="create_graph=True reached a fused operation"):
        torch.autograd.grad(y.square().sum(), own, create_graph=True)


@pytest.mark.parametrize(("update", "gate"), PLAIN)
def test_second_derivative_of_plain_operations_is_exact(randomize, update, gate):
    layer = _layer(update, gate, randomize)
    parameter = layer.update.b

    def slope():
        (first,) = torch.autograd.grad(layer(x).square().sum(), [parameter], create_graph=True)
        return first.sum()

    x = layer_inputs(layer)[0].detach()
    (second,) = torch.autograd.grad(slope(), [parameter])
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-5
    after = slope()
    with torch.no_grad():
        parameter.view(-1)[0] -= 2e-5
    if update == "lora":  # DoRA's norm is detached from the graph
        expected = (after - slope()) / 2e-5
        assert float(second.view(-1)[0]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_second_derivative_of_fused_loss_is_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 4), None, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="create_graph=True reached a fused operation"):
        torch.autograd.grad(loss, [hidden], create_graph=True)
