"""Prepared updates compute the same numbers, bit for bit; fast ones read one weight for a token whose gate is decided."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.gates import TokenGate
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears

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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["none", "token"])
@pytest.mark.parametrize("update", ["dora", "hira"])
def test_training_inside_is_refused(tiny_llama, update, gate, training):
    model = adapted(tiny_llama, update, gate).train(training)
    with prepared_for_inference(model), pytest.raises(RuntimeError, match="inside prepared_for_inference"):
        model(IDS)
    model(IDS).logits.sum().backward()
    assert all(layer.update.a.grad is not None for layer in adapted_linears(model).values())


def decided_layer(update="hira", gate="token", dtype=torch.float64):
    """A layer whose gates are set by the first feature of x."""
    torch.manual_seed(0)
    layer = AdaptedLinear(
        nn.Linear(8, 6).to(dtype), AdapterConfig(update=update, gate=gate, rank=3, adapter_dtype="float64")
    )
    with torch.no_grad():
        layer.update.b.normal_()
        if gate == "token":
            layer.gate.weight.zero_()[0] = 1.0
        elif gate == "static":
            layer.gate.bias.fill_(0.7)
    return layer.eval()


def with_logits(*logits, batch=()):
    x = torch.randn(len(logits), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.tensor(logits)
    return x.view(*batch, len(logits), 8)


FAST = {"skip_below": 0.1, "merge_above": 0.9}


@pytest.mark.parametrize("at_a_time", [1, 3, 60], ids=["one_token", "few_rows", "prefill"])
@pytest.mark.parametrize("logits", [(-8, 8, 0.3, -8, 8, -1), (-8,) * 6, (8,) * 6, (0.2,) * 6], ids=str)
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_fast_is_the_layer_with_hard_gates(update, logits, at_a_time):
    layer, x = decided_layer(update), with_logits(*logits * 10)
    delta = layer.update.delta_weight(layer.base.weight)
    g = torch.sigmoid(x[:, 0])
    hard = torch.where(g < 0.1, 0.0, torch.where(g > 0.9, 1.0, g))
    with torch.no_grad():
        expected = layer.base(x) + hard[:, None] * (x @ delta.t())
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
            found = torch.cat([layer(tokens.unsqueeze(1)).squeeze(1) for tokens in x.split(at_a_time)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 60])
@pytest.mark.parametrize("thresholds", [{"skip_below": 0.1}, {"merge_above": 0.9}], ids=str)
def test_one_threshold_leaves_the_other_gates_as_they_are(thresholds, at_a_time):
    layer, x = decided_layer(), with_logits(*(-800, -8, -2.1, 0.3, 2.1, 8, 800) * 6)
    g = torch.sigmoid(x[:, 0])
    hard = torch.where(g < 0.1, 0.0, g) if "skip_below" in thresholds else torch.where(g > 0.9, 1.0, g)
    with torch.no_grad():
        expected = layer.base(x) + hard[:, None] * (x @ layer.update.delta_weight(layer.base.weight).t())
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **thresholds):
            found = torch.cat([layer(tokens) for tokens in x.split(at_a_time)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_without_gates_of_its_own_a_token_takes_the_merged_weight(update, gate):
    layer, x = decided_layer(update, gate), with_logits(1, 2, 3)
    with torch.no_grad():
        expected = layer(x)
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
            assert torch.equal(layer(x), nn.functional.linear(x, layer.routed.merged, layer.base.bias))


@pytest.mark.parametrize(
    ("logits", "products"),
    [
        ((-8,), 1),
        ((8,), 1),
        ((0,), 2),
        ((-8, -8), 2),
        ((8, 8), 2),
        ((-8, 8), 4),
        ((-8, 8) * 16, 64),
        ((-8, 8) * 17, 34),
        ((0, 8) * 30, 90),
    ],
    ids=str,
)
def test_how_many_products_tokens_take(logits, products):
    layer, x = decided_layer(), with_logits(*logits)
    with (
        torch.no_grad(),
        prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST),
        FlopCounterMode(display=False) as counter,
    ):
        layer(x)
    assert counter.get_total_flops() == products * 2 * 8 * 6


def test_a_gate_of_another_kind_is_asked_itself():
    class Negated(TokenGate):
        def forward(self, x):
            return -super().forward(x)

    layer, x = decided_layer(), with_logits(-8, 8, 0.3)
    layer.gate.__class__ = Negated
    with torch.no_grad():
        g = torch.sigmoid(-x[:, 0])
        hard = torch.where(g < 0.1, 0.0, torch.where(g > 0.9, 1.0, g))
        expected = layer.base(x) + hard[:, None] * (x @ layer.update.delta_weight(layer.base.weight).t())
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
            found = torch.cat([layer(token[None]) for token in x])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gates_are_still_recorded_and_the_layer_is_as_before_afterwards():
    layer, x = decided_layer(), with_logits(-800, 800, 0)
    seen = []
    layer.on_gate = seen.append
    with torch.no_grad():
        exact = layer(x)
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
            fast = torch.cat([layer(token[None]) for token in x])
        assert torch.equal(layer(x), exact)
    assert torch.cat(seen[1:4]).tolist() == [-800, 800, 0]
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-12)


def test_training_inside_of_fast_is_refused():
    layer, x = decided_layer(), with_logits(0)
    with (
        prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST),
        pytest.raises(RuntimeError, match="inside prepared_for"),
    ):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_model_generates_the_same_where_gates_are_decided(tiny_llama, dtype):
    model = adapted(tiny_llama, "hira", dtype=dtype)
    with torch.no_grad():
        for index, layer in enumerate(adapted_linears(model).values()):
            layer.update.b.mul_(0.05)
            layer.gate.weight.zero_()
            layer.gate.bias.fill_(40.0 if index % 2 else -40.0)
        exact = model(IDS).logits
        with prepared_for_inference(model, **FAST):
            fast = model(IDS).logits
    assert float((fast - exact).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.05) * float(
        exact.abs().max()
    )


def test_a_gate_that_is_no_number_is_not_hidden():
    layer, x = decided_layer(), with_logits(*(-8, 8, 0) * 20)
    with torch.no_grad():
        layer.gate.bias.fill_(float("nan"))
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
            assert all(bool(layer(x[:tokens]).isnan().all()) for tokens in (1, 6, 60))


@pytest.mark.parametrize("tokens", [1, 6, 60])
def test_fast_under_autocast(tokens):
    layer, x = decided_layer(), with_logits(*(-8, 8, 0) * 20)[:tokens]
    with torch.no_grad(), prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize("thresholds", [{}, FAST], ids=["exact", "fast"])
def test_an_error_while_preparing_leaves_the_model_as_it_was(tiny_llama, thresholds, monkeypatch):
    model = adapted(tiny_llama, "hira")
    layers = list(adapted_linears(model).values())

    def no_memory(weight):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layers[4].update, "constant", no_memory)
    monkeypatch.setattr(layers[4].update, "delta_weight", no_memory)
    with pytest.raises(torch.OutOfMemoryError), prepared_for_inference(model, **thresholds):
        pass
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.routed is None and layer.update.kept is None for layer in layers)
