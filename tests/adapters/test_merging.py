"""Merging replaces adapted layers by linear layers; a gate that depends on the token forbids it."""

import warnings

import pytest
import torch
import torch.nn.utils.prune
from adapted_layers import gate_config
from torch import nn

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters, merge_adapter
from gatera_lightning.adapters.lookup import adapted_linears

UPDATES = ["lora", "dora", "hira"]
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def _adapted(tiny_llama, randomize, update, gate, dtype=torch.float32, **settings):
    model = tiny_llama(dtype, attention_bias=True, initializer_range=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if update != "hira":
        settings["alpha"] = 6.0
    config = AdapterConfig(update=update, gate=gate, rank=4, target_modules=TARGETS, **settings)
    inject_adapters(model, config, generator)
    return randomize(model, size=0.2).eval()


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(14).reshape(2, 7)).logits


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", UPDATES)
def test_merged_model_equals_adapted_model(tiny_llama, randomize, update, gate, kind):
    dtype = getattr(torch, kind)
    model = _adapted(tiny_llama, randomize, update, gate_config(gate, bias=-0.5), dtype, adapter_dtype=kind)
    backbone = tiny_llama(dtype, attention_bias=True, initializer_range=0.2)
    expected, names = _logits(model), set(dict(backbone.named_parameters()))
    assert (expected - _logits(backbone)).abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = merge_adapter(model)
    assert merged is model
    assert not adapted_linears(merged)
    layers = merged.model.layers
    assert all(type(getattr(layer.self_attn, name)) is nn.Linear for layer in layers for name in TARGETS[:3])
    assert all(type(getattr(layer.mlp, name)) is nn.Linear for layer in layers for name in TARGETS[3:])
    assert set(dict(merged.named_parameters())) == names
    assert {p.dtype for p in merged.parameters()} == {dtype}
    torch.testing.assert_close(_logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", UPDATES)
def test_merged_weight_equals_dense_formula(randomize, update, gate):
    base = nn.Linear(7, 13).double()
    model = nn.Sequential(base)
    w0, bias = base.weight.detach().clone(), base.bias.detach().clone()
    alpha = None if update == "hira" else 6.0
    settings = {"update": update, "gate": gate, "rank": 3, "alpha": alpha, "adapter_dtype": "float64"}
    inject_adapters(model, AdapterConfig(target_modules=["0"], **settings))
    randomize(model)
    p = {name: value.detach() for name, value in model[0].adapter_params().items()}
    merge_adapter(model)
    ba, g = p["update.b"] @ p["update.a"], torch.sigmoid(p["gate.bias"]) if gate == "static" else 1
    adapted = {"lora": w0 + 2 * ba, "dora": w0 + 2 * ba, "hira": w0 + w0 * ba}[update]
    if update == "dora":
        adapted = p["update.magnitude"].unsqueeze(1) * adapted / adapted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model[0].weight.detach(), w0 + g * (adapted - w0), rtol=1e-12, atol=1e-12)
    assert torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("update", UPDATES)
def test_merge_rejects_token_gate(tiny_llama, randomize, update):
    model = _adapted(tiny_llama, randomize, update, "token")
    before, modules = _logits(model), [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match="q_proj has a 'token' gate, whose value differs between tokens"):
        merge_adapter(model)
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(_logits(model), before)


def test_merge_rejects_model_without_adapter(tiny_llama):
    with pytest.raises(ValueError, match="no adapted layers"):
        merge_adapter(tiny_llama())


@pytest.mark.parametrize("update", UPDATES)
def test_merging_into_bfloat16_warns_and_rounds_once(tiny_llama, randomize, update):
    model = _adapted(tiny_llama, randomize, update, "static", torch.bfloat16)
    layer = model.model.layers[1].mlp.up_proj
    expected = layer.weight.float() + torch.sigmoid(layer.gate.bias) * layer.update.delta_weight(layer.weight)
    with pytest.warns(UserWarning, match="16-bit weights"):
        merge_adapter(model)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["update.a", "update.b", "gate.bias"])
def test_merge_rejects_non_finite_factors(tiny_llama, randomize, name, value):
    model = _adapted(tiny_llama, randomize, "hira", "static")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".base." in key}
    path = f"model.layers.1.mlp.up_proj.{name}"
    with torch.no_grad():
        adapter_parameters(model)[path].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{path} holds NaN or infinite values; the backbone is unchanged"):
        merge_adapter(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_merge_rejects_weights_that_overflow(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize, "lora", "none", torch.float16)
    with torch.no_grad():
        adapter_parameters(model)["model.layers.1.mlp.up_proj.update.b"].fill_(1e5)
    with pytest.raises(ValueError, match=r"merged weight of model.layers.1.mlp.up_proj .* torch.float16"):
        merge_adapter(model)
    assert len(adapted_linears(model)) == 10


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _triple(module, args, output):
    return 3 * output


def _replaced_forward(layer):
    original = layer.forward
    layer.forward = lambda x: original(x) + 1


CHANGES_AFTER_INJECTION = {
    "hook of the layer": (lambda layer: layer.register_forward_hook(_triple), "has hooks"),
    "pre-hook of the layer": (lambda layer: layer.register_forward_pre_hook(lambda *_: None), "has hooks"),
    "forward of the layer": (_replaced_forward, "forward of its own"),
    "backward hook of the layer": (lambda layer: layer.register_full_backward_hook(_triple), "has hooks"),
    "parametrization": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer.base, "weight", Doubled()),
        "computed from other tensors",
    ),
    "weight_norm": (
        lambda layer: nn.utils.parametrizations.weight_norm(layer.base),
        "computed from other tensors",
    ),
    "pruning": (
        lambda layer: nn.utils.prune.random_unstructured(layer.base, "weight", amount=0.5),
        "has hooks or a forward",
    ),
    "meta device": (lambda layer: layer.to("meta"), "is on the meta device"),
}


@pytest.mark.parametrize("change", CHANGES_AFTER_INJECTION)
def test_merge_rejects_layers_changed_after_injection_before_it_merges_any(tiny_llama, randomize, change):
    model = _adapted(tiny_llama, randomize, "lora", "none")
    names = list(adapted_linears(model))
    apply, expected = CHANGES_AFTER_INJECTION[change]
    first = adapted_linears(model)[names[0]].base.weight.clone()
    apply(adapted_linears(model)[names[-1]])
    with pytest.raises(ValueError, match=f"{names[-1]} .*{expected}"):
        merge_adapter(model)
    assert list(adapted_linears(model)) == names
    assert torch.equal(adapted_linears(model)[names[0]].base.weight, first)


def test_merge_rejects_hooks_of_all_modules(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize, "lora", "none")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="has hooks"):
            merge_adapter(model)
    finally:
        handle.remove()
    assert not adapted_linears(merge_adapter(model))
