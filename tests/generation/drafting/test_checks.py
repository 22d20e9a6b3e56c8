"""Models and settings whose drafts cannot be verified are refused by name, with plain decoding offered."""

import pytest
import torch
from model_families import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gatera_lightning import AdapterConfig, ConfigError, inject_adapters
from gatera_lightning.adapters.draft_adapter import DraftAdapter
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.generation.drafting import DraftConfig, Drafter
from gatera_lightning.generation.drafting.checks import decoding_problems

NO_LAYERS = DraftAdapter(torch.nn.Module(), {}, {}, AdapterConfig(update="lora", gate="position", rank=4))

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC_BY_LAYER = {
    "full_attention": DYNAMIC_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def build(family, **settings):
    config = AutoConfig.for_model(family, **(SIZES | settings))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mamba", {}, "MambaForCausalLM has a state that cannot forget rejected drafts"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "has a state that cannot forget"),
        ("mistral", {"sliding_window": 3}, "draft.block: 4, with a sliding window of 3 tokens; accepted: at"),
        (
            "phi3",
            {"rope_parameters": LONG_ROPE},
            "has rope_type 'longrope', whose rotation depends on the last",
        ),
        ("llama", {"rope_parameters": DYNAMIC_ROPE}, "has rope_type 'dynamic', whose rotation depends on"),
        (
            "gemma3_text",
            {"head_dim": 8, "rope_parameters": DYNAMIC_BY_LAYER},
            "has rope_type 'dynamic', whose",
        ),
        ("bert", {"is_decoder": False}, "the tokens of BertLMHeadModel attend to later ones"),
    ],
)
def test_model_is_refused(family, settings, message):
    with pytest.raises(ConfigError, match=f"{message}.*, or decoding without a draft adapter"):
        Drafter(build(family, **settings), NO_LAYERS)


def test_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    expected = "T5ForConditionalGeneration is no causal language model; accepted: one, or decoding without a"
    with pytest.raises(ConfigError, match=expected):
        Drafter(model, NO_LAYERS)


def test_model_with_position_gates_is_refused(tiny_llama):
    model = tiny_llama().eval()
    inject_adapters(model, AdapterConfig(update="lora", gate="position", rank=4))
    with pytest.raises(ConfigError, match="the model's own adapter: a 'position' gate takes a mask"):
        Drafter(model, NO_LAYERS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 1}, "draft.block: 1; accepted: an integer of at least 2"),
        ({"block": 2.0}, "draft.block"),
        ({"cycle": "one_foward"}, "draft.cycle: 'one_foward' is unknown; .* did you mean 'one_forward'"),
    ],
)
def test_setting_is_refused(tiny_llama, settings, message):
    with pytest.raises(ConfigError, match=message):
        Drafter(tiny_llama(), NO_LAYERS, DraftConfig(**settings))


def test_decoding_is_refused(tiny_llama):
    drafter = Drafter(tiny_llama().eval(), NO_LAYERS)
    batch = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2), "eos_id": 1, "pad_id": 0}
    with pytest.raises(ConfigError, match=r"decoding.beams: 4, with drafts; accepted: 1, or decoding"):
        drafter.generate(batch, DecodingConfig(beams=4))
    config = DecodingConfig(no_repeat_ngram_size=2, use_cache=False)
    assert [problem.partition(":")[0] for problem in decoding_problems(config)] == [
        "decoding.no_repeat_ngram_size",
        "decoding.use_cache",
    ]
