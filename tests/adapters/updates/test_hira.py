"""HiRA's fast form for ungated training."""

import pytest
import torch
from adapted_layers import DTYPES, adapted_layer, layer_inputs
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(
    ("kind", "dropout", "training", "matmuls"),
    [("fp32", 0.0, True, 3), ("bf16", 0.0, True, 5), ("fp32", 0.5, True, 5), ("fp32", 0.0, False, 5)],
)
@pytest.mark.parametrize("gate", ["none", "static"])
def test_hira_without_token_gate_trains_with_merged_weight(randomize, gate, kind, dropout, training, matmuls):
    layer = randomize(adapted_layer("hira", gate, dtype=DTYPES[kind][0], dropout=dropout)).train(training)
    x, dy = layer_inputs(layer)
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(dy)
    size, factors = layer.weight.numel(), 4 * 2 * 3 * layer.weight.numel()  # B A twice, dA and dB
    assert counter.get_total_flops() == matmuls * 2 * 6 * size + factors


def test_autocast_does_not_round_merged_weight(randomize):
    layer = randomize(adapted_layer("hira", "none"))
    x, _ = layer_inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = layer.train()(x)
        assert torch.equal(merged, layer.eval()(x))
