"""What every update guarantees: its initial values, its definition and its merged weight."""

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import ALL_UPDATES, UPDATE_NAMES, adapted_layer, layer_inputs
from torch import nn

from gatera_lightning.adapters.gates import GateValues
from gatera_lightning.adapters.updates import UPDATES, describe_updates, register_update
from gatera_lightning.adapters.updates.lora import LoRA


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_initial_values(update):
    layer = adapted_layer(update, "none", (64, 48, 8))
    bound = 1 / 64**0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < layer.update.a.abs().max() <= bound
    assert not layer.update.b.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_forward_equals_definition(randomize, update, gated, training):
    layer = randomize(adapted_layer(update, "none", dtype=torch.float64, adapter_dtype="float64"))
    layer.train(training)
    x, _ = layer_inputs(layer)
    g = torch.rand(x.shape[:-1], dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    found = layer.update(x, layer.base, GateValues(g) if gated else None, nn.Identity())
    expected = layer.base(x) + (g.unsqueeze(-1) if gated else 1) * layer.update.delta(x, layer.base)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_forward_with_dropout_equals_definition_with_dropout(randomize, update):
    settings = {"dtype": torch.float64, "adapter_dtype": "float64", "dropout": 0.5}
    layer = randomize(adapted_layer(update, "none", **settings)).train()
    x, _ = layer_inputs(layer)
    torch.manual_seed(5)
    found = layer.update(x, layer.base, None, layer.dropout)
    torch.manual_seed(5)
    delta = layer.update.delta_with_dropout(x, layer.base, layer.dropout)
    torch.testing.assert_close(found, layer.base(x) + delta, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(delta, layer.update.delta(x, layer.base))


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_prepared_definition_equals_plain_definition(randomize, update):
    layer = randomize(adapted_layer(update, "none"))
    x, _ = layer_inputs(layer)
    with torch.no_grad():
        expected = layer.update.delta(x, layer.base)
        layer.update.prepare(layer.base)
        assert torch.equal(layer.update.delta(x, layer.base), expected)
    assert layer.update.is_prepared == (update != "lora")
    layer.update.release()
    assert not layer.update.is_prepared


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_delta_weight_equals_applied_update(randomize, update):
    layer = randomize(adapted_layer(update, "none", dtype=torch.float64, adapter_dtype="float64", bias=False))
    x, _ = layer_inputs(layer)
    expected = layer(x) - layer.base(x)
    torch.testing.assert_close(
        F.linear(x, layer.update.delta_weight(layer.weight)), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("update", ["lora", "dora"])
def test_scale_is_alpha_over_rank(randomize, update):
    size = (7, 13, 4)
    halved, one = (randomize(adapted_layer(update, "none", size, alpha=alpha)) for alpha in (2.0, None))
    assert (halved.update.scale, one.update.scale) == (0.5, 1.0)
    x, _ = layer_inputs(one)
    with torch.no_grad():
        one.update.b.mul_(0.5)
    torch.testing.assert_close(halved(x), one(x))


def test_descriptions_list_every_update():
    assert tuple(UPDATES) == ALL_UPDATES
    assert all(f"{name} = {update.formula}" in describe_updates() for name, update in UPDATES.items())


def test_register_update_rejects_taken_name():
    class Other(LoRA):
        pass

    with pytest.raises(ValueError, match="an update named 'lora' is already registered: LoRA"):
        register_update(Other)
    assert UPDATES["lora"] is LoRA
