"""What models are found to do when they are tried."""

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning.backbone.probes import (
    caches_only_keys_and_values,
    eval_mode,
    has_plain_frozen_head,
    isolates_packed_sequences,
    replaced_forward,
    returns_head_output,
)

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
CONVOLUTION = {"layer_types": ["conv"] * 2}


def build(name, attention="eager", dtype=torch.float32, **config):
    """A tiny model whose logits differ clearly between tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(SIZES | {"initializer_range": 0.3} | config))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.config.use_cache = False  # as load_backbone does
    return model


# --- isolates_packed_sequences ---


def ignoring_positions(model):
    """Let a model ignore ``position_ids``."""
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "attention", "config"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("gemma2", "eager", {"head_dim": 8}),
        ("qwen3", "sdpa", {"head_dim": 8}),
        ("gpt2", "sdpa", GPT2),  # learned positions
        ("gpt2", "eager", GPT2),
    ],
)
def test_isolates_packed_sequences_of_models_that_use_positions(name, attention, config, dtype):
    """In training mode, in which GPT-2's dropout makes any two forward passes differ."""
    model = build(name, attention, **config).to(dtype).train()
    assert isolates_packed_sequences(model)
    assert model.training
    assert not isolates_packed_sequences(ignoring_positions(model))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("opt", OPT),
        ("lfm2", CONVOLUTION),
    ],
    ids=["recurrent state", "no positions", "positions without a mask", "convolution"],
)
def test_isolates_packed_sequences_rejects_models_that_mix_them(name, config):
    assert not isolates_packed_sequences(build(name, **config))


@pytest.mark.parametrize("error", [0.02, 0.2])
def test_isolates_packed_sequences_tolerates_rounding(error):
    """Kernels with a mask round differently; in bf16, by a tenth of the logits' standard deviation."""
    model = build("llama", "sdpa", torch.bfloat16)
    forward = model.forward

    def rounded_differently(**inputs):
        output = forward(**inputs)
        if "position_ids" in inputs:
            noise = torch.sign(torch.sin(1e4 * output.logits))
            output.logits = output.logits + error * output.logits.std() * noise
        return output

    model.forward = rounded_differently
    assert isolates_packed_sequences(model)


class Leak(nn.Module):
    """Adds to every token a little of the one before it, as a convolution does."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x, *args, **kwargs):
        return self.layer(x + self.size * F.pad(x, (0, 0, 1, 0))[:, :-1], *args, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-7), (torch.float32, 1e-3), (torch.bfloat16, 0.5)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_isolates_packed_sequences_rejects_small_influence(name, dtype, size):
    model = build(name, "sdpa", dtype, head_dim=8)
    assert isolates_packed_sequences(model)
    model.model.layers[0].mlp = Leak(model.model.layers[0].mlp, size)
    assert not isolates_packed_sequences(model)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
        ("mamba", {"state_size": 4}),
        ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}),
        ("bamba", MAMBA),
        ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32}),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
        ("rwkv", {}),
    ],
)
def test_isolates_packed_sequences_rejects_states_of_any_size(name, config, dtype):
    """With weights as small as these, a state changes the loss by a millionth."""
    assert not isolates_packed_sequences(build(name, dtype=dtype, **(config | {"initializer_range": 1e-3})))


def test_isolates_packed_sequences_rejects_wrong_positions_under_a_correct_mask():
    """Sequences that attend only to themselves, at positions of the packed row, differ from separate ones."""
    model = build("gpt2", "sdpa", **GPT2)
    forward = model.forward

    def isolated_at_wrong_positions(position_ids=None, **inputs):
        if position_ids is None:
            return forward(**inputs)
        sequences = (position_ids == 0).cumsum(1)
        mask = (sequences[:, :, None] == sequences[:, None]).tril()[:, None]
        positions = torch.arange(sequences.shape[1]).expand_as(sequences)
        return forward(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions)

    model.forward = isolated_at_wrong_positions
    assert not isolates_packed_sequences(model)


# --- returns_head_output ---


def frozen(name="llama", dtype=torch.float64, **config):
    return build(name, dtype=dtype, **FAMILIES[name], **config).requires_grad_(False).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_returns_head_output_of_models_without_soft_cap_or_scale(name, dtype):
    assert returns_head_output(frozen(name, dtype)) == (name in {"llama", "qwen2", "phi3"})


def test_has_plain_frozen_head_rejects_trainable_head():
    model = frozen()
    assert has_plain_frozen_head(model)
    model.lm_head.weight.requires_grad_(True)
    assert not has_plain_frozen_head(model)
    assert not returns_head_output(model)


def test_has_plain_frozen_head_rejects_subclass_of_linear():
    class Quantized(nn.Linear):
        pass

    model = frozen()
    model.lm_head.__class__ = Quantized
    assert not has_plain_frozen_head(model)
    assert not returns_head_output(model)


def test_has_plain_frozen_head_rejects_replaced_forward():
    model = frozen()
    model.lm_head.forward = replacement = lambda hidden: F.linear(hidden, model.lm_head.weight)
    assert not has_plain_frozen_head(model)
    assert not returns_head_output(model)
    assert model.lm_head.forward is replacement


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.mul_(0.5),
        lambda logits: logits * 1.0,
        lambda logits: torch.cat([logits, logits], -1),
    ],
    ids=["in place", "times one", "another shape"],
)
def test_returns_head_output_rejects_changed_logits(change):
    model = frozen()
    inner = model.forward

    def forward(**inputs):
        output = inner(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    assert not returns_head_output(model)


def test_returns_head_output_rejects_hook_on_the_head():
    model = frozen()
    handle = model.lm_head.register_forward_hook(lambda _, args, out: 0.5 * out)
    assert not returns_head_output(model)
    handle.remove()
    assert returns_head_output(model)


def test_returns_head_output_leaves_no_trace():
    model = frozen(attention_dropout=0.5)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    assert returns_head_output(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, SIZES["vocab_size"])


# --- the others ---


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("llama", {}, True),
        ("gemma2", {"head_dim": 8}, True),
        ("mamba", {"state_size": 4}, False),
        ("lfm2", CONVOLUTION, False),
    ],
)
def test_caches_only_keys_and_values(name, config, expected):
    assert caches_only_keys_and_values(build(name, **config)) == expected


def test_eval_mode_restores_every_module_after_an_error():
    model = frozen()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def fail():
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == modes


def test_replaced_forward_is_undone_after_an_error():
    module = nn.Linear(2, 2)

    def fail():
        with replaced_forward(module, lambda x: -x):
            assert torch.equal(module(torch.ones(2)), -torch.ones(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in vars(module)
