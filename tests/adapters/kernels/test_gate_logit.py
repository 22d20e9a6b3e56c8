"""The token gate's logit: its precision and what it saves."""

import pytest
import torch
from adapted_layers import DTYPES, adapted_layer, assert_close, layer_inputs
from saved_tensors import saved_by, storage

from gatera_lightning.adapters.kernels.gate_logit import token_logit

IN, BATCH, TOKENS = 37, 2, 5


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_token_logit_is_float32(randomize, kind, autocast):
    layer = randomize(adapted_layer("hira", "token", dtype=DTYPES[kind][0]))
    x, _ = layer_inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = layer.gate(x)
    assert z.dtype == torch.float32
    assert_close(
        "z", z.detach(), x.detach().double() @ layer.gate.weight.double() + layer.gate.bias.double(), 1e-6
    )


def test_token_logit_saves_its_input_without_copy():
    x = torch.randn(BATCH, TOKENS, IN).bfloat16().requires_grad_()
    w, b = torch.randn(IN, requires_grad=True), torch.zeros(1, requires_grad=True)
    z, saved = saved_by(lambda: token_logit(x, w, b))
    assert z.dtype == torch.float32
    assert {storage(tensor) for tensor in saved} == {storage(x), storage(w)}
