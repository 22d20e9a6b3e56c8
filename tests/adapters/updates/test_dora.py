"""DoRA's row norms and magnitude."""

import pytest
import torch
from adapted_layers import (
    GATE_NAMES,
    UPDATE_NAMES,
    actual,
    adapted_layer,
    assert_all_close,
    layer_inputs,
    reference,
)
from torch import nn

from gatera_lightning import AdapterConfig, merge_adapter
from gatera_lightning.adapters.layer import AdaptedLinear


def test_magnitude_starts_at_row_norms():
    layer = adapted_layer("dora", "none", (64, 48, 8))
    torch.testing.assert_close(layer.update.magnitude.detach(), layer.base.weight.norm(dim=1))


def test_row_norm_equals_dense_norm(randomize):
    layer = randomize(adapted_layer("dora", "none", dtype=torch.float64, adapter_dtype="float64"))
    dense = layer.weight + layer.update.scale * layer.update.b @ layer.update.a
    torch.testing.assert_close(layer.update.row_norm(layer.weight), dense.norm(dim=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATE_NAMES)
def test_zero_row_stays_finite(gate):
    base = nn.Linear(7, 13)
    with torch.no_grad():
        base.weight[4] = 0
    layer = AdaptedLinear(base, AdapterConfig(update="dora", gate=gate, rank=3))
    x, dy = layer_inputs(layer)
    y, grads = actual(layer, x, dy)
    torch.testing.assert_close(y, base(x))
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize("gate", GATE_NAMES)
@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_float32_adapter_over_float64_weight(randomize, update, gate):
    layer = randomize(adapted_layer(update, gate, dtype=torch.float64))
    x, dy = layer_inputs(layer)
    found = actual(layer, x, dy)
    assert found[0].dtype == torch.float64
    assert_all_close(found, reference(layer, x, dy), 1e-5)


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_merging_float32_adapter_keeps_float64_weight(update):
    """B is zero, so a merged weight that went through float32 would show."""
    layer = adapted_layer(update, "none", dtype=torch.float64)
    before = layer.weight.clone()
    model = merge_adapter(nn.Sequential(layer))
    torch.testing.assert_close(model[0].weight, before, rtol=0, atol=1e-7 if update == "dora" else 0)
