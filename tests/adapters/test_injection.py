"""Which layers are adapted, what is frozen, and which settings are rejected."""

import pytest
import torch
from adapted_layers import UPDATE_NAMES
from torch import nn

from gatera_lightning import AdapterConfig, ConfigError, adapter_parameters, inject_adapters
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.decoder_layers import decoder_layers


def _config(targets=("q_proj",), **settings):
    return AdapterConfig(**({"rank": 2, "target_modules": list(targets)} | settings))


def _snapshot(model):
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    values = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    return modules, values


def _problems(model, config):
    """Return the problems that inject_adapters reports, after checking that the model is unchanged."""
    before = _snapshot(model)
    with pytest.raises(ConfigError) as caught:
        inject_adapters(model, config)
    assert _snapshot(model) == before
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def _phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Phi3ForCausalLM(Phi3Config(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes))


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=64, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, **sizes
    )
    return MixtralForCausalLM(config)


def _gemma3():
    """Its vision tower has projections with the same names as the text decoder's, and comes first."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 24,
        "num_experts": 2,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=64, num_experts_per_tok=1, **sizes))


def test_report_counts_matches_per_pattern(tiny_llama):
    model = tiny_llama()
    backbone_size = sum(p.numel() for p in model.parameters())
    report = inject_adapters(
        model, _config(["q_proj", "down_proj", r"model\.layers\.1\.self_attn\..*"], rank=3)
    )
    assert report.matches == {"q_proj": 2, "down_proj": 2, r"model\.layers\.1\.self_attn\..*": 4}
    assert report.layers == (  # in model order, once each although two patterns match some
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    )
    assert report.layers == tuple(adapted_linears(model))
    # q, o: 32 -> 32 (three of them); k, v: 32 -> 16; down: 48 -> 32; rank 3, and in + 1 for the gate
    expected = 3 * (3 * 64 + 33) + 2 * (3 * 48 + 33) + 2 * (3 * 80 + 49)
    assert report.trainable == expected == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.frozen == backbone_size == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    text = str(report)
    assert text.startswith("7 adapted layers (q_proj × 2, down_proj × 2, model")
    assert f"{expected:,} trainable parameters ({100 * expected / (expected + backbone_size):.2f} %)" in text


def test_target_modules_match_last_segment_or_full_name(tiny_llama):
    assert _problems(tiny_llama(), _config(["proj"]))
    assert _problems(tiny_llama(), _config(["q_pro."]))  # an expression is not tried on the last segment
    assert _problems(tiny_llama(), _config(["layers.0.self_attn.q_proj"]))
    assert inject_adapters(tiny_llama(), _config([r".*\.0\..*_proj"])).matches == {r".*\.0\..*_proj": 7}
    assert inject_adapters(tiny_llama(), _config(["model.layers.0.mlp.up_proj"])).matches.popitem()[1] == 1
    assert len(inject_adapters(tiny_llama(), _config([r".*q_proj|.*v_proj"])).layers) == 4


def test_layers_select_decoder_layers(tiny_llama):
    model = tiny_llama(layers=3)
    report = inject_adapters(model, _config(["q_proj", "up_proj"], layers=[2, 0]))
    assert report.matches == {"q_proj": 2, "up_proj": 2}
    assert {name.split(".")[2] for name in report.layers} == {"0", "2"}
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear


def test_inject_rejects_missing_layers(tiny_llama):
    (problem,) = _problems(tiny_llama(), _config(layers=[0, 2, 7]))
    assert "adapter.layers: [2, 7] do not exist" in problem
    assert "0…1" in problem


def test_only_adapter_is_trainable(tiny_llama):
    model = tiny_llama()
    frozen = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in frozen.items()}
    inject_adapters(model, _config(["q_proj", "down_proj"], update="dora"))
    adapter = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter)
    assert set(adapter) == {
        f"model.layers.{i}.{layer}.{name}"
        for i in range(2)
        for layer in ("self_attn.q_proj", "mlp.down_proj")
        for name in ("update.a", "update.b", "update.magnitude", "gate.weight", "gate.bias")
    }
    frozen_now = {
        name.replace(".base.", "."): p for name, p in model.named_parameters() if name not in adapter
    }
    assert {name: id(p) for name, p in frozen_now.items()} == {name: id(p) for name, p in frozen.items()}
    model(torch.arange(8).reshape(1, 8)).logits.square().sum().backward()
    assert all((p.grad is not None) == (name in adapter) for name, p in model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in frozen.items())


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_fresh_adapted_model_equals_backbone(tiny_llama, update):
    model, tokens = tiny_llama(), torch.arange(12).reshape(2, 6)
    expected = model(tokens).logits
    inject_adapters(model, _config(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], update=update))
    assert torch.equal(model(tokens).logits, expected)


def test_inject_reports_all_invalid_settings(tiny_llama):
    config = _config(
        ["q_proj", "("],
        update="hirra",
        gate="soft",
        rank=0,
        alpha=-1.0,
        dropout=1.0,
        layers=[],
        adapter_dtype="int8",
    )
    problems = _problems(tiny_llama(), config)
    names = "update", "adapter_dtype", "rank", "alpha", "dropout", "gate", "target_modules", "layers"
    assert [problem.split(":")[0] for problem in problems] == [f"adapter.{name}" for name in names]
    assert (
        "'hirra' is unknown; accepted: lora, dora, hira, abba, block_hira; did you mean 'hira'?"
        in problems[0]
    )
    assert "'soft' is unknown; accepted: none, static, token" in problems[5]


def test_inject_reports_all_model_problems(tiny_llama):
    problems = _problems(tiny_llama(), _config(["q_proj", "query", "w2", "up_proj"], rank=33, layers=[0, 9]))
    expected = (
        "layers: [9]",
        "target_modules: 'query'",
        "target_modules: 'w2'",
        "rank: 33 exceeds model.layers.0.",
    )
    assert len(problems) == len(expected)
    assert all(
        problem.startswith(f"adapter.{start}") for problem, start in zip(problems, expected, strict=True)
    )


def test_inject_rejects_rank_above_smaller_side(tiny_llama):
    (problem,) = _problems(tiny_llama(), _config(["k_proj"], rank=17))
    assert "17 exceeds model.layers.0.self_attn.k_proj (32 -> 16); accepted here: 1 to 16" in problem
    assert inject_adapters(tiny_llama(), _config(["k_proj"], rank=16)).matches == {"k_proj": 2}


def test_pattern_without_match_lists_linear_layers(tiny_llama):
    (problem,) = _problems(tiny_llama(), _config(["query_proj"]))
    assert "'query_proj' matches no linear layer" in problem
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"{name} × 2" in problem
    assert "lm_head" not in problem
    assert not any(word in problem for word in ("fused", "Conv1D", "expert"))


@pytest.mark.parametrize("tied", [True, False])
def test_output_head_is_not_adapted(tiny_llama, tied):
    (problem,) = _problems(tiny_llama(tie_word_embeddings=tied), _config(["lm_head"]))
    assert "The output head itself is never adapted" in problem
    model = tiny_llama(tie_word_embeddings=tied)
    report = inject_adapters(model, _config([".*"]))
    assert report.matches == {".*": 14}
    assert type(model.lm_head) is nn.Linear


def test_error_explains_conv1d_layers():
    (problem,) = _problems(_gpt2(), _config(["c_attn"]))
    assert "c_attn, c_fc, c_proj: Conv1D layers (transposed weights), which cannot be adapted" in problem
    assert "no nn.Linear at all" in problem


def test_fused_projections_can_be_adapted():
    (problem,) = _problems(_phi3(), _config(["q_proj"]))
    assert "qkv_proj, gate_up_proj: fused projections, adapted as one layer under that name" in problem
    model = _phi3()
    assert inject_adapters(model, _config(["qkv_proj", "gate_up_proj"])).matches == {
        "qkv_proj": 1,
        "gate_up_proj": 1,
    }
    assert model(torch.arange(6).reshape(1, 6)).logits.isfinite().all()


def test_error_explains_expert_weights():
    (problem,) = _problems(_mixtral(), _config(["down_proj"]))
    assert "down_proj, gate_up_proj: mixture-of-experts weights in one 3-D parameter" in problem
    assert "fused" not in problem
    assert inject_adapters(_mixtral(), _config(["q_proj"])).matches == {"q_proj": 1}


def test_report_lists_expert_weights():
    """The shared expert's projections match the patterns; the routed experts' weights cannot be adapted."""
    report = inject_adapters(_qwen2_moe(), _config(["q_proj", "down_proj"]))
    assert report.layers == ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_expert.down_proj")
    assert report.experts == ("down_proj", "gate_up_proj")
    assert str(report).endswith("not adapted: the experts' down_proj, gate_up_proj")


def test_conv_weights_are_not_experts(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].conv = nn.Conv1d(4, 4, 3)
    assert inject_adapters(model, _config()).experts == ()


def test_model_whose_head_is_called_decoder():
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    special = dict.fromkeys(
        ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0
    )
    model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes, **special))
    assert inject_adapters(model, _config()).layers == ("model.layers.0.attn.q_proj",)


def test_only_text_decoder_of_vision_model_is_adapted():
    model = _gemma3()
    layers = inject_adapters(model, _config(["q_proj", "up_proj"])).layers
    assert layers == (
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.mlp.up_proj",
    )
    assert decoder_layers(model) is model.model.language_model.layers
    (problem,) = _problems(_gemma3(), _config(["fc1"]))
    assert "'fc1' matches no linear layer" in problem


@pytest.mark.parametrize("training", [True, False])
def test_adapted_layer_inherits_training_mode(tiny_llama, training):
    """Hugging Face returns models in evaluation mode."""
    model = tiny_llama().train(training)
    inject_adapters(model, _config(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize(
    "weight", [torch.zeros(32, 32, dtype=torch.int8), torch.zeros(512, 1)], ids=["int8", "packed"]
)
def test_inject_rejects_quantized_weights(tiny_llama, weight):
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    (problem,) = _problems(model, _config())
    assert problem.startswith("backbone.id: model.layers.1.self_attn.q_proj is a Linear whose weight is")
    assert "accepted: weights that are not quantized, or layers of bitsandbytes" in problem


def test_inject_rejects_adapted_model(tiny_llama):
    model = tiny_llama()
    inject_adapters(model, _config())
    (problem,) = _problems(model, _config(["k_proj"]))
    assert "already adapted" in problem


@pytest.mark.parametrize("update", UPDATE_NAMES)
def test_generator_determines_initial_values(tiny_llama, update):
    def start(seed, noise):
        torch.manual_seed(noise)
        model = tiny_llama()
        inject_adapters(
            model, _config(["q_proj", "up_proj"], update=update), torch.Generator().manual_seed(seed)
        )
        return adapter_parameters(model)

    first, same, other = start(7, 0), start(7, 1), start(8, 0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) != name.endswith("update.a") for name in first)
    a = [p for name, p in first.items() if name.endswith("q_proj.update.a")]
    assert not torch.equal(a[0], a[1])  # drawn separately for each layer


def test_adapter_dtype_differs_from_backbone_dtype(tiny_llama):
    model = tiny_llama(torch.bfloat16)
    inject_adapters(model, _config(update="dora", adapter_dtype="float64"))
    adapter = adapter_parameters(model)
    assert {p.dtype for p in adapter.values()} == {torch.float64}
    assert {p.dtype for name, p in model.named_parameters() if name not in adapter} == {torch.bfloat16}
    assert model(torch.arange(4).reshape(1, 4)).logits.dtype == torch.bfloat16


def test_inject_accepts_plain_module():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    report = inject_adapters(model, _config(["0", "2"], layers=[2, 0]))
    assert report.layers == ("0", "2")
    assert [type(module) for module in model] == [AdaptedLinear, nn.ReLU, AdaptedLinear]
