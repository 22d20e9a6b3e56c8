"""Folders of PEFT's own LoRA, DoRA and HiRA load with equal logits; options that are lacking are named."""

import json

import peft
import pytest
import torch

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
)
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.stored_config import read_stored_config

TARGETS = ["q_proj", "down_proj"]
METHODS = {
    "lora": lambda **settings: peft.LoraConfig(r=3, lora_alpha=6, **settings),
    "rslora": lambda **settings: peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, **settings),
    "dora": lambda **settings: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, **settings),
    "hira": lambda **settings: peft.HiraConfig(r=3, **settings),
}


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """Return a function that saves an adapter of PEFT's own and returns its logits and folder."""

    def save(method, dtype=torch.float32, **settings):
        settings = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
        model = peft.get_peft_model(tiny_llama(), METHODS[method](**settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "hira_" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                    parameter.data = parameter.data.to(dtype)
        model.save_pretrained(tmp_path / method)
        return _logits(model.float()), tmp_path / method

    return save


@pytest.mark.parametrize("method", METHODS)
def test_adapter_of_peft_loads(tiny_llama, saved, method):
    expected, folder = saved(method)
    model = tiny_llama()
    config = load_adapter(model, folder)
    assert (config.update, config.gate.kind) == ("lora" if method == "rslora" else method, "none")
    assert (_logits(model) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_choice_of_layers_is_that_of_peft(tiny_llama, saved, settings):
    expected, folder = saved("lora", **settings)
    model = tiny_llama()
    load_adapter(model, folder)
    assert (_logits(model) - expected).abs().max() < 1e-6


def test_factors_in_16_bit_load(tiny_llama, saved):
    expected, folder = saved("lora", torch.bfloat16)
    model = tiny_llama()
    load_adapter(model, folder)
    assert (_logits(model) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("bias", "gate"), [(30.0, 1.0), (-30.0, 0.0)])
@pytest.mark.parametrize("method", ["lora", "dora", "hira"])
def test_gates_start_open_or_closed_by_choice(tiny_llama, saved, method, bias, gate):
    expected, folder = saved(method)
    model = tiny_llama()
    alpha = None if method == "hira" else 6.0
    config = AdapterConfig(
        update=method, gate=TokenGateConfig(bias=bias), rank=3, alpha=alpha, target_modules=TARGETS
    )
    inject_adapters(model, config)
    load_adapter(model, folder)
    assert (_logits(model) - (expected if gate else _logits(tiny_llama()))).abs().max() < 1e-5
    gates = {name: p for name, p in adapter_parameters(model).items() if ".gate." in name}
    assert {float(p) for name, p in gates.items() if name.endswith("bias")} == {bias}


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "lora",
            {"bias": "all"},
            "bias: 'all' of a LORA adapter of PEFT cannot be loaded: this package trains no",
        ),
        ("lora", {"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens: \[1, 2\] .*activated LoRA"),
        (
            "lora",
            {"init_lora_weights": "pissa"},
            "init_lora_weights: 'pissa' .*it changes the frozen weights",
        ),
        ("lora", {"modules_to_save": ["lm_head"]}, "modules_to_save: .*PeftModel.from_pretrained"),
        ("lora", {"use_qalora": True}, "use_qalora: True .*no such option"),
        ("lora", {"lora_bias": True}, "lora_bias: True .*no such option"),
        ("lora", {"new_option": 3}, "new_option: 3 .*no such option"),
        ("hira", {"fan_in_fan_out": True}, "fan_in_fan_out: True .*Conv1D"),
        ("lora", {"r": "3"}, "rank: '3' is not a rank"),
        ("lora", {"lora_alpha": "x"}, "alpha: 'x'"),
        ("lora", {"base_model_name_or_path": 5}, "base_model_name_or_path: 5; accepted: a text or null"),
        ("lora", {"target_modules": None}, "target_modules: None"),
        ("lora", {"peft_type": "VERA"}, "peft_type: 'VERA'; accepted: GATERA, LORA, HIRA"),
    ],
)
def test_option_that_is_lacking_is_named(saved, method, change, message):
    _, folder = saved(method)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterFileError, match=message):
        read_stored_config(folder)


def test_missing_layer_is_named(tiny_llama, saved):
    _, folder = saved("lora")
    with pytest.raises(AdapterFileError, match="missing tensors"):
        load_adapter(tiny_llama(layers=3), folder)
