"""Preparing for inference: bit-identical without thresholds; with them, saturated tokens read one weight."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import (
    AdapterConfig,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from gatera_lightning.adapters.gates import TokenGate
from gatera_lightning.adapters.inference import prepared_bytes, prepared_for_inference
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
@pytest.mark.parametrize("gate", ["none", "static", "token", "hard"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_exact_mode_is_bit_identical(tiny_llama, update, gate, dtype):
    model = adapted(tiny_llama, update, gate, dtype)
    with torch.no_grad():
        expected = model(IDS).logits
        with prepared_for_inference(model):
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


def test_hadamard_weight_is_computed_once(tiny_llama):
    model = adapted(tiny_llama, "hira")
    with torch.no_grad(), prepared_for_inference(model), FlopCounterMode(display=False) as prepared:
        model(IDS)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        model(IDS)
    matmul = sum(2 * 4 * layer.base.weight.numel() for layer in adapted_linears(model).values())
    assert plain.get_total_flops() - prepared.get_total_flops() == matmul


def test_closed_hard_gates_do_not_read_the_update():
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(6, 5, bias=False), AdapterConfig(gate="hard", rank=2)).eval()
    x = torch.eye(6)
    with torch.no_grad():
        nn.init.normal_(layer.update.b)
        layer.gate.weight[0] = 2.0  # open for the first token
        layer.gate.bias.fill_(-1.0)
        with prepared_for_inference(nn.ModuleDict({"one": layer})):
            with FlopCounterMode(display=False) as closed:
                assert torch.equal(layer(x[1:]), layer.base(x[1:]))
            with FlopCounterMode(display=False) as one_open:
                assert not torch.equal(layer(x), layer.base(x))
    matmul = 2 * 6 * 5
    assert closed.get_total_flops() == 2 * 5 * matmul  # the layer's own, and that of the frozen one
    assert one_open.get_total_flops() == 3 * 6 * matmul


def test_changed_factors_apply_after_block(tiny_llama):
    model = adapted(tiny_llama, "hira")
    with torch.no_grad():
        with prepared_for_inference(model):
            before = model(IDS).logits
        for layer in adapted_linears(model).values():
            layer.update.b.mul_(2)
        assert not torch.equal(model(IDS).logits, before)


def test_blocks_can_be_nested(tiny_llama):
    model = adapted(tiny_llama, "dora")
    layers = adapted_linears(model).values()
    with prepared_for_inference(model):
        with prepared_for_inference(model):
            pass
        assert all(layer.update.is_prepared for layer in layers)
    assert not any(layer.update.is_prepared for layer in layers)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["none", "token"])
@pytest.mark.parametrize("update", ["dora", "hira"])
def test_forward_with_gradients_is_rejected(tiny_llama, update, gate, training):
    model = adapted(tiny_llama, update, gate).train(training)
    with prepared_for_inference(model), pytest.raises(RuntimeError, match="prepared_for_inference"):
        model(IDS)
    model(IDS).logits.sum().backward()
    assert all(layer.update.a.grad is not None for layer in adapted_linears(model).values())


def layer_with_set_gates(update="hira", gate="token", dtype=torch.float64):
    """Return a layer whose gate logit is the first feature of x."""
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


THRESHOLDS = {"skip_below": 0.1, "merge_above": 0.9}


@pytest.mark.parametrize("at_a_time", [1, 3, 60], ids=["one_token", "few_rows", "prefill"])
@pytest.mark.parametrize("logits", [(-8, 8, 0.3, -8, 8, -1), (-8,) * 6, (8,) * 6, (0.2,) * 6], ids=str)
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_thresholds_equal_hard_gates(update, logits, at_a_time):
    layer, x = layer_with_set_gates(update), with_logits(*logits * 10)
    delta = layer.update.delta_weight(layer.base.weight)
    g = torch.sigmoid(x[:, 0])
    hard = torch.where(g < 0.1, 0.0, torch.where(g > 0.9, 1.0, g))
    with torch.no_grad():
        expected = layer.base(x) + hard[:, None] * (x @ delta.t())
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS):
            found = torch.cat([layer(tokens.unsqueeze(1)).squeeze(1) for tokens in x.split(at_a_time)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 60])
@pytest.mark.parametrize("thresholds", [{"skip_below": 0.1}, {"merge_above": 0.9}], ids=str)
def test_single_threshold_keeps_other_gates(thresholds, at_a_time):
    layer, x = layer_with_set_gates(), with_logits(*(-800, -8, -2.1, 0.3, 2.1, 8, 800) * 6)
    g = torch.sigmoid(x[:, 0])
    hard = torch.where(g < 0.1, 0.0, g) if "skip_below" in thresholds else torch.where(g > 0.9, 1.0, g)
    with torch.no_grad():
        expected = layer.base(x) + hard[:, None] * (x @ layer.update.delta_weight(layer.base.weight).t())
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **thresholds):
            found = torch.cat([layer(tokens) for tokens in x.split(at_a_time)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_gate_without_token_uses_merged_weight(update, gate):
    layer, x = layer_with_set_gates(update, gate), with_logits(1, 2, 3)
    with torch.no_grad():
        expected = layer(x)
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
            assert torch.equal(
                layer(x), nn.functional.linear(x, layer.inference_path.merged_weight, layer.base.bias)
            )


@pytest.mark.parametrize(
    ("logits", "matmuls"),
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
def test_number_of_matmuls(logits, matmuls):
    layer, x = layer_with_set_gates(), with_logits(*logits)
    with (
        torch.no_grad(),
        prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS),
        FlopCounterMode(display=False) as counter,
    ):
        layer(x)
    assert counter.get_total_flops() == matmuls * 2 * 8 * 6


def test_subclass_of_token_gate_computes_its_own_logit():
    class Negated(TokenGate):
        def forward(self, x, base_out=None, update_out=None):
            return -super().forward(x)

    layer, x = layer_with_set_gates(), with_logits(-8, 8, 0.3)
    layer.gate.__class__ = Negated
    with torch.no_grad():
        g = torch.sigmoid(-x[:, 0])
        hard = torch.where(g < 0.1, 0.0, torch.where(g > 0.9, 1.0, g))
        expected = layer.base(x) + hard[:, None] * (x @ layer.update.delta_weight(layer.base.weight).t())
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS):
            found = torch.cat([layer(token[None]) for token in x])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gates_are_recorded_and_layer_is_restored():
    layer, x = layer_with_set_gates(), with_logits(-800, 800, 0)
    seen = []
    layer.set_gate_listener(seen.append)
    with torch.no_grad():
        exact = layer(x)
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS):
            found = torch.cat([layer(token[None]) for token in x])
        assert torch.equal(layer(x), exact)
    assert torch.cat(seen[1:4]).tolist() == [-800, 800, 0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_forward_with_gradients_is_rejected_with_thresholds():
    layer, x = layer_with_set_gates(), with_logits(0)
    with (
        prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS),
        pytest.raises(RuntimeError, match="prepared_for_inference"),
    ):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_with_saturated_gates_is_close_to_exact(tiny_llama, dtype):
    model = adapted(tiny_llama, "hira", dtype=dtype)
    with torch.no_grad():
        for index, layer in enumerate(adapted_linears(model).values()):
            layer.update.b.mul_(0.05)
            layer.gate.weight.zero_()
            layer.gate.bias.fill_(40.0 if index % 2 else -40.0)
        exact = model(IDS).logits
        with prepared_for_inference(model, **THRESHOLDS):
            found = model(IDS).logits
    assert float((found - exact).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.05) * float(
        exact.abs().max()
    )


def test_nan_gate_is_not_hidden():
    layer, x = layer_with_set_gates(), with_logits(*(-8, 8, 0) * 20)
    with torch.no_grad():
        layer.gate.bias.fill_(float("nan"))
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS):
            assert all(bool(layer(x[:tokens]).isnan().all()) for tokens in (1, 6, 60))


@pytest.mark.parametrize("tokens", [1, 6, 60])
def test_thresholds_under_autocast(tokens):
    layer, x = layer_with_set_gates(), with_logits(*(-8, 8, 0) * 20)[:tokens]
    with torch.no_grad(), prepared_for_inference(nn.ModuleDict({"one": layer}), **THRESHOLDS):
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize("thresholds", [{}, THRESHOLDS], ids=["exact", "thresholds"])
def test_error_while_preparing_restores_model(tiny_llama, thresholds, monkeypatch):
    model = adapted(tiny_llama, "hira")
    layers = list(adapted_linears(model).values())

    def no_memory(weight):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layers[4].update, "inference_constant", no_memory)
    monkeypatch.setattr(layers[4].update, "delta_weight", no_memory)
    with pytest.raises(torch.OutOfMemoryError), prepared_for_inference(model, **thresholds):
        pass
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert not any(layer.inference_path or layer.update.is_prepared for layer in layers)


def test_prepared_bytes_count_cached_weights(tiny_llama):
    for update, share in (("lora", 0), ("dora", 0), ("hira", 1)):
        model = adapted(tiny_llama, update)
        weights = sum(layer.base.weight.nbytes for layer in adapted_linears(model).values())
        assert prepared_bytes(model, with_thresholds=False) == share * weights
        assert prepared_bytes(model, with_thresholds=True) == weights


def _step(model):
    parameters = list(adapter_parameters(model).values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def _changed_state(model):
    return {name: tensor + 1 for name, tensor in model.state_dict().items() if ".update.b" in name}


CHANGES = {
    "in place": lambda model: next(iter(adapter_parameters(model).values())).mul_(2),
    "optimizer step": _step,
    "load_state_dict": lambda model: model.load_state_dict(_changed_state(model), strict=False),
    "assigned": lambda model: model.load_state_dict(_changed_state(model), strict=False, assign=True),
    "cast": lambda model: model.to(torch.float64),
    "frozen weight": lambda model: model.model.layers[0].self_attn.q_proj.weight.add_(1),
    "replaced": lambda model: setattr(
        model.model.layers[0].self_attn.q_proj.update, "a", nn.Parameter(torch.ones(4, 32))
    ),
}


@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 0.1, "merge_above": 0.9}], ids=["exact", "fast"])
@pytest.mark.parametrize(("update", "gate"), [("hira", "token"), ("dora", "static"), ("hira", "none")])
@pytest.mark.parametrize("change", CHANGES)
def test_change_inside_block_is_rejected_at_the_next_forward(tiny_llama, change, update, gate, thresholds):
    model = adapted(tiny_llama, update, gate)
    with torch.no_grad():
        with prepared_for_inference(model, **thresholds):
            model(IDS)
            CHANGES[change](model)
            with pytest.raises(RuntimeError, match="changed inside prepared_for_inference"):
                model(IDS)
        expected = model(IDS).logits
        with prepared_for_inference(model):
            assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 0.1, "merge_above": 0.9}], ids=["exact", "fast"])
def test_load_adapter_inside_block_is_rejected(tiny_llama, tmp_path, thresholds):
    model = adapted(tiny_llama, "hira")
    other = adapted(tiny_llama, "hira")
    save_adapter(other, tmp_path)
    with torch.no_grad(), prepared_for_inference(model, **thresholds):
        expected = model(IDS).logits
        with pytest.raises(RuntimeError, match="load_adapter: the model is inside prepared_for_inference"):
            load_adapter(model, tmp_path)
        assert torch.equal(model(IDS).logits, expected)
    load_adapter(model, tmp_path)
    assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 0.1, "merge_above": 0.9}], ids=["exact", "fast"])
def test_merging_inside_block_keeps_the_output(tiny_llama, thresholds):
    model = adapted(tiny_llama, "hira", "static")
    with torch.no_grad():
        expected = model(IDS).logits
        with prepared_for_inference(model, **thresholds):
            model(IDS)
            merge_adapter(model)
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def _triple(module, args, output):
    return 3 * output if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize(
    "register",
    [
        lambda base: base.register_forward_hook(_triple),
        lambda base: base.register_forward_pre_hook(lambda module, args: (-args[0],)),
        lambda base: nn.modules.module.register_module_forward_hook(_triple),
        lambda base: nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: (-args[0],) if module is base else None
        ),
    ],
    ids=["hook", "pre-hook", "hook of all modules", "pre-hook of all modules"],
)
@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 0.1}], ids=str)
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_hook_added_inside_block_applies(tiny_llama, update, thresholds, register):
    layer = next(iter(adapted_linears(adapted(tiny_llama, update, "static")).values()))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        handle = register(layer.base)
        expected = layer(x)
        handle.remove()
        with prepared_for_inference(nn.Sequential(layer), **thresholds):
            without = layer(x)
            handle = register(layer.base)
            try:
                found = layer(x)
            finally:
                handle.remove()
            assert torch.equal(layer(x), without)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, without)
