"""Draft rows of several architectures see what they should; models with another state are refused."""

import pytest
import torch
from model_families import FAMILIES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives import SelfDraft, self_draft, training_loss


def drafting(kind, targets, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).double()
    config = AdapterConfig(
        update="lora", gate="position", rank=4, adapter_dtype="float64", target_modules=targets
    )
    inject_adapters(model, config)
    return model


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "eager"), *((name, "eager" if name == "gemma2" else "sdpa") for name in FAMILIES)],
)
def test_families_are_accepted(family, attention, randomize):
    settings = SIZES | FAMILIES[family] | {"attn_implementation": attention}
    model = randomize(drafting(family, ["o_proj", "down_proj"], **settings))
    state = torch.get_rng_state()
    SelfDraft().prepare(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert self_draft._head_compares(model) == (family in ("llama", "qwen2", "phi3"))
    ids = torch.randint(3, 96, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, 0] = -100
    losses = []
    for _ in range(2):  # in the head if it can, then from logits
        torch.manual_seed(1)
        losses.append(training_loss(model.train(), batch, objectives=[SelfDraft([3])]).item())
        self_draft._RETURNS_HEAD_OUTPUT[model] = False
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert 0 < losses[0] < 2


def test_model_with_a_recurrent_state_is_rejected():
    model = drafting("mamba", ["out_proj"], vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ConfigError, match="MambaForCausalLM keeps a state that cannot drop draft rows"):
        SelfDraft().prepare(model)
