"""Captured rows are one text each: nothing after its end, and no other text's tokens."""

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.gate_analysis.capture import capture_gates

PROMPTS = torch.tensor([[0, 5, 6, 7], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama(initializer_range=0.5, seed=3)
    inject_adapters(model, AdapterConfig(rank=3, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class EndAt(StoppingCriteria):
    """Ends the first row after so many tokens in all."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        ended[0] = input_ids.shape[1] >= self.length
        return ended


def _ended_early(model):
    """Settings under which the first text ends after three new tokens, and the second goes on."""
    free = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, do_sample=False, pad_token_id=0)
    end = int(free[0, 6])
    assert end not in free[0, 4:6]
    assert end not in free[1, 4:]
    return {
        "end token": {"eos_token_id": end},
        "several end tokens": {"eos_token_id": [127, end]},
        "padding is the end token": {"eos_token_id": end, "pad_token_id": end},
        "stopping criterion": {"stopping_criteria": [EndAt(7)]},
        "static cache": {"eos_token_id": end, "cache_implementation": "static"},
    }


@pytest.mark.parametrize(
    "how",
    ["end token", "several end tokens", "padding is the end token", "stopping criterion", "static cache"],
)
def test_nothing_after_the_end_of_a_text_is_counted(model, how):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | _ended_early(model)[how]
    with capture_gates(model) as captured:
        ids = model.generate(PROMPTS, attention_mask=MASK, **settings)
    with capture_gates(model) as alone:
        settings.pop("cache_implementation", None)
        model.generate(PROMPTS[:1, 1:], attention_mask=MASK[:1, 1:], **settings)
        if how == "stopping criterion":
            del alone.calls[3:]  # it counts the padding of the batch
    row, gates = captured.row(0)
    assert row == [5, 6, 7, *ids[0, 4:6].tolist()] == alone.row(0)[0]
    np.testing.assert_allclose(gates, alone.row(0)[1], atol=1e-5)
    columns = captured.columns()
    assert (columns["row"] == 0).sum() == gates.size
    assert len(captured.row(1)[0]) == 4 + 7


def test_second_generation_in_a_block_starts_with_all_rows(model):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | _ended_early(model)["end token"]
    with capture_gates(model) as captured:
        model.generate(PROMPTS, attention_mask=MASK, **settings)
        first = len(captured.calls)
        model.generate(PROMPTS, attention_mask=MASK, **settings)
        model(PROMPTS)
    assert torch.equal(captured.calls[first].non_padding, MASK.bool())
    assert captured.calls[-1].non_padding.all()
    with pytest.raises(ValueError, match=rf"forward pass {first} does not continue forward pass {first - 1}"):
        captured.row(0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 4}, "num_beams 4"),
        ({"num_beams": 4, "num_return_sequences": 4}, "num_beams 4"),
        ({"num_beams": 2, "do_sample": True}, "num_beams 2"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
        ({"custom_generate": lambda *_, **__: None}, "custom_generate"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_generation_that_moves_texts_between_rows_is_rejected(model, settings, named):
    with capture_gates(model) as captured, pytest.raises(ValueError, match=named):
        model.generate(PROMPTS[1:], max_new_tokens=5, pad_token_id=0, **settings)
    assert captured.calls == []
    assert "generate" not in vars(model)


def test_assistant_model_is_rejected(model, tiny_llama):
    with capture_gates(model), pytest.raises(ValueError, match="assistant_model 'LlamaForCausalLM'"):
        model.generate(PROMPTS[1:], max_new_tokens=5, pad_token_id=0, assistant_model=tiny_llama())


def test_sampled_sequences_are_rows_of_their_own(model):
    torch.manual_seed(0)
    with capture_gates(model) as captured:
        ids = model.generate(
            PROMPTS,
            attention_mask=MASK,
            max_new_tokens=4,
            do_sample=True,
            num_return_sequences=3,
            pad_token_id=0,
        )
    assert [captured.row(row)[0] for row in range(6)] == [
        row[1 if number < 3 else 0 : -1] for number, row in enumerate(ids.tolist())
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([0, 1]))),
    ],
    ids=["reordered", "duplicated", "dropped", "repeated"],
)
def test_own_loop_that_reorders_the_cache_is_rejected(model, change):
    with capture_gates(model):
        cache = model(PROMPTS, use_cache=True).past_key_values
        cache = model(PROMPTS[:, :1], past_key_values=cache, use_cache=True).past_key_values
        change(cache)
        rows = cache.layers[0].keys.shape[0]
        with pytest.raises(ValueError, match="reordered or replaced between two forward passes"):
            model(PROMPTS[:rows, :1], past_key_values=cache, use_cache=True)
