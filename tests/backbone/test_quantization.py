"""Backbones that are quantized while they load: saving, loading over another form, merging."""

import logging
from types import SimpleNamespace

import pytest
import torch
from packed_layers import ALL_STORAGES
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    ConfigError,
    inject_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from gatera_lightning.adapters.packed_weight import PackedWeight
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.backbone import load_backbone
from gatera_lightning.backbone.quantization import (
    check_stored_quantization,
    dequantize_linear_layers,
    stored_quantization,
)
from gatera_lightning.cost_model.step_costs import build_on_meta, model_sizes
from gatera_lightning.distributed.sharded_loading import load_sharded

IDS = torch.arange(12).view(1, 12)


def _load(folder, quantization="none"):
    return load_backbone(BackboneConfig(id=str(folder), dtype="float32", quantization=quantization))


def _adapted(folder, quantization, randomize, gate="none"):
    model = _load(folder, quantization)
    inject_adapters(model, AdapterConfig(rank=4, gate=gate))
    return randomize(model).eval()


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_every_linear_layer_but_the_head_is_packed(tiny_backbone, storage):
    model = _load(tiny_backbone, storage)
    packed = {name for name, p in model.named_parameters() if isinstance(p, PackedWeight)}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert packed == linear - {"lm_head.weight"}


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_adapter_loads_over_the_same_form_and_with_a_warning_over_another(
    tiny_backbone, tmp_path, randomize, storage, caplog
):
    model = _adapted(tiny_backbone, storage, randomize)
    save_adapter(model, tmp_path)
    assert read_adapter_config(tmp_path)[1]["quantization"] == storage
    with caplog.at_level(logging.WARNING):
        same = _load(tiny_backbone, storage)
        load_adapter(same, tmp_path)
        assert "quantization" not in caplog.text
        assert torch.equal(same.eval()(IDS).logits, model(IDS).logits)
        load_adapter(_load(tiny_backbone), tmp_path)
    assert f"with quantization {storage}, and loaded over it with quantization none" in caplog.text


def test_merge_into_dense_values_keeps_the_outputs(tiny_backbone, randomize):
    model = _adapted(tiny_backbone, "int8", randomize)
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="is stored as int8"):
        merge_adapter(model)
    dequantize_linear_layers(model)
    torch.testing.assert_close(merge_adapter(model)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_backbone_that_was_stored_quantized_can_be_adapted(tiny_backbone, tmp_path, randomize, kind):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit", bnb_4bit_quant_type="nf4"
    )
    stored = AutoModelForCausalLM.from_pretrained(
        tiny_backbone, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    stored.save_pretrained(tmp_path)
    model = _adapted(tmp_path, "none", randomize)
    assert any(isinstance(p, PackedWeight) for p in model.parameters())
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    wrong = "int8" if kind == "4bit" else "nf4"
    hf_config = AutoConfig.from_pretrained(tmp_path)
    assert stored_quantization(hf_config) == ("nf4" if kind == "4bit" else "int8")
    with pytest.raises(ConfigError, match=f"'{wrong}', but the weights of .* are already quantized"):
        check_stored_quantization(hf_config, "here", wrong)
    with pytest.raises(
        ConfigError, match=r"backbone\.compile: true, but the weights of 'here' are quantized"
    ):
        check_stored_quantization(hf_config, "here", "none", compiles=True)
    on_meta = build_on_meta(
        hf_config, BackboneConfig(id="here"), AdapterConfig(rank=4, gate="none"), torch.float32
    )
    assert model_sizes(on_meta) == model_sizes(model)
    strategy = SimpleNamespace(
        global_rank=0, root_device=torch.device("cpu"), broadcast=lambda message: message
    )
    with pytest.raises(ConfigError, match="AdapterShardingStrategy cannot shard them"):
        load_sharded(
            BackboneConfig(id=str(tmp_path)), AdapterConfig(rank=4), strategy, seed=0, warm_start=None
        )


def test_missing_package_is_reported_before_weights_are_read(tiny_backbone, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes, which is missing: pip install"):
        _load(tiny_backbone, "nf4")


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_peft_folder_stores_the_quantization(tiny_backbone, tmp_path, storage, caplog):
    pytest.importorskip("peft", reason="needs the package peft")
    from peft import PeftModel, get_peft_model

    from gatera_lightning.peft import GateRAConfig

    model = get_peft_model(_load(tiny_backbone, storage), GateRAConfig(r=4, gate="static"))
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match=f"stored as {storage} would round the merged"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path)[1]["quantization"] == storage
    with caplog.at_level(logging.WARNING):
        same = PeftModel.from_pretrained(_load(tiny_backbone, storage), tmp_path)
        assert "quantization" not in caplog.text
        PeftModel.from_pretrained(_load(tiny_backbone), tmp_path)
    assert f"with quantization {storage}, and loaded over it with quantization none" in caplog.text
    assert torch.equal(same.eval()(IDS).logits, model.eval()(IDS).logits)


def test_settings_that_cannot_work_are_named(monkeypatch):
    (problem,) = BackboneConfig(quantization="nf5").problems()
    assert "'nf5' is unknown" in problem
    assert "did you mean 'nf4'?" in problem
    (problem,) = BackboneConfig(id="a/b", quantization="int8", compile=True).problems()
    assert "with backbone.compile: true" in problem
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = BackboneConfig(id="a/b", quantization="nf4").problems()
    assert "needs the package bitsandbytes, which is missing: pip install" in problem
