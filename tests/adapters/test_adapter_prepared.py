"""Prepared updates compute the same numbers, bit for bit, without computing their constants again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.inject import adapted_linears
from gatera_lightning.adapters.prepared import prepared_for_inference

IDS = torch.arange(12).reshape(2, 6)


def adapted(tiny_llama, update, gate="token", dtype=torch.float32):
    model = tiny_llama(dtype)
    inject_adapters(model, AdapterConfig(update=update, gate=gate, rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".update.b" in name or ".gate.weight" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["none", "static", "token"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_the_same_numbers(tiny_llama, update, gate, dtype):
    model = adapted(tiny_llama, update, gate, dtype)
    with torch.no_grad():
        expected = model(IDS).logits
        with prepared_for_inference(model):
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


def test_the_product_of_the_factors_is_computed_once(tiny_llama):
    model = adapted(tiny_llama, "hira")
    with torch.no_grad(), prepared_for_inference(model), FlopCounterMode(display=False) as prepared:
        model(IDS)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        model(IDS)
    products = sum(2 * 4 * layer.base.weight.numel() for layer in adapted_linears(model).values())
    assert plain.get_total_flops() - prepared.get_total_flops() == products


def test_factors_that_change_afterwards_are_seen(tiny_llama):
    model = adapted(tiny_llama, "hira")
    with torch.no_grad():
        with prepared_for_inference(model):
            before = model(IDS).logits
        for layer in adapted_linears(model).values():
            layer.update.b.mul_(2)
        assert not torch.equal(model(IDS).logits, before)


def test_blocks_within_blocks(tiny_llama):
    model = adapted(tiny_llama, "dora")
    layers = adapted_linears(model).values()
    with prepared_for_inference(model):
        with prepared_for_inference(model):
            pass
        assert all(layer.update.kept is not None for layer in layers)
    assert all(layer.update.kept is None for layer in layers)


@pytest.mark.parametrize("update", ["dora", "hira"])
def test_training_inside_is_refused(tiny_llama, update):
    model = adapted(tiny_llama, update)
    with prepared_for_inference(model), pytest.raises(RuntimeError, match="inside prepared_for_inference"):
        model(IDS)
    model(IDS).logits.sum().backward()
    assert all(layer.update.a.grad is not None for layer in adapted_linears(model).values())
