"""The Hadamard update's autograd function: its dtype under autocast and what it saves."""

import pytest
import torch
from adapted_layers import adapted_layer, assert_close, layer_inputs
from saved_tensors import saved_by, storage

from gatera_lightning.adapters.kernels.hadamard import add_gated_hadamard

IN, OUT, RANK, BATCH, TOKENS = 37, 41, 3, 2, 5


def test_autocast_keeps_hadamard_matmuls_in_weight_dtype(randomize):
    layer = randomize(adapted_layer("hira", "none"))
    x, dy = layer_inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = add_gated_hadamard(torch.zeros_like(dy), x, layer.weight, layer.update.a, layer.update.b)
    u.backward(dy)
    dense = layer.weight.double() * (layer.update.b.double() @ layer.update.a.double())
    assert_close("u", u.detach(), x.detach().double() @ dense.t(), 1e-5)
    assert_close("dx", x.grad, dy.double() @ dense, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hadamard_update_saves_only_its_arguments(dtype):
    x = torch.randn(BATCH, TOKENS, IN).to(dtype).requires_grad_()
    weight, g = torch.randn(OUT, IN).to(dtype), torch.rand(BATCH, TOKENS, requires_grad=True)
    a, b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    y = torch.zeros(BATCH, TOKENS, OUT, dtype=dtype)
    _, saved = saved_by(lambda: add_gated_hadamard(y, x, weight, a, b, g))
    assert {storage(tensor) for tensor in saved} == {storage(tensor) for tensor in (x, weight, a, b, g)}
