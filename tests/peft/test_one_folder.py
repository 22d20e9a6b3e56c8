"""A folder of this package is one of PEFT's: equal logits in both, and equal bytes where nothing changed."""

import itertools

import pytest
import torch
from adapted_layers import ALL_UPDATES, EVEN_UPDATES
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from gatera_lightning import AdapterConfig, AdapterFileError, inject_adapters, load_adapter, save_adapter
from gatera_lightning.adapters.gates import GATES
from gatera_lightning.peft import GateRAConfig

FILES = ("adapter_config.json", "adapter_model.safetensors")
TARGETS = ["q_proj", "down_proj"]
METHODS = list(itertools.product(ALL_UPDATES, GATES))


@pytest.fixture
def load(backbone_folder):
    """Return a function that loads another copy of the backbone."""
    return lambda **settings: AutoModelForCausalLM.from_pretrained(backbone_folder, **settings)


@pytest.fixture
def adapted(load, randomize):
    """Return a function that adapts the backbone by ``inject_adapters``."""

    def adapt(update="hira", gate="token", **settings):
        model = load()
        config = {"update": update, "gate": gate, "rank": _rank(update), "target_modules": TARGETS} | settings
        inject_adapters(model, AdapterConfig(**config), torch.Generator().manual_seed(0))
        return randomize(model)

    return adapt


def _rank(update):
    return 4 if update in EVEN_UPDATES else 3


def _bytes(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize(("update", "gate"), METHODS, ids="-".join)
def test_ours_to_peft_to_ours(load, adapted, logits, tmp_path, update, gate):
    model = adapted(update, gate)
    ours = save_adapter(model, tmp_path / "ours", template="plain")
    peft_model = PeftModel.from_pretrained(load(), ours)
    assert torch.equal(logits(peft_model), logits(model))
    peft_model.save_pretrained(tmp_path / "peft")
    assert _bytes(tmp_path / "peft") == _bytes(ours)
    again = load()
    load_adapter(again, tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))
    assert _bytes(save_adapter(again, tmp_path / "again", template="plain")) == _bytes(ours)


@pytest.mark.parametrize(("update", "gate"), METHODS, ids="-".join)
def test_peft_to_ours_to_peft(load, logits, randomize, tmp_path, update, gate):
    model = randomize(
        get_peft_model(
            load(),
            GateRAConfig(
                update=update, gate=gate, r=_rank(update), target_modules=TARGETS, task_type="CAUSAL_LM"
            ),
        )
    )
    model.save_pretrained(tmp_path / "peft")
    ours = load()
    load_adapter(ours, tmp_path / "peft")
    assert torch.equal(logits(ours), logits(model))
    assert _bytes(save_adapter(ours, tmp_path / "ours")) == _bytes(tmp_path / "peft")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(model))


def test_peft_model_is_saved_and_loaded_by_our_calls(load, logits, adapted, tmp_path):
    ours = save_adapter(adapted(), tmp_path / "ours")
    model = PeftModel.from_pretrained(load(), ours)
    assert _bytes(save_adapter(model, tmp_path / "again")) == _bytes(ours)
    other = get_peft_model(load(), GateRAConfig(r=3, target_modules=TARGETS))
    load_adapter(other, ours)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"rank_pattern": {"q_proj": 2}}],
)
def test_what_only_peft_saves_is_not_left_out(load, tmp_path, settings):
    model = get_peft_model(load(), GateRAConfig(r=3, target_modules=TARGETS, **settings))
    with pytest.raises(ValueError, match=r"save_adapter: .*; call model.save_pretrained"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_other_backbone_is_refused(adapted, tiny_llama, tmp_path):
    ours = save_adapter(adapted(), tmp_path)
    model = tiny_llama(seed=1)
    before = [type(module) for module in model.modules()]
    with pytest.raises(AdapterFileError, match="this adapter was trained on another backbone"):
        PeftModel.from_pretrained(model, ours)
    assert [type(module) for module in model.modules()] == before


def test_backbone_in_float16_is_accepted(load, adapted, tmp_path):
    ours = save_adapter(adapted(), tmp_path / "ours")
    model = PeftModel.from_pretrained(load(dtype=torch.float16), ours)
    model.save_pretrained(tmp_path / "again")
    assert _bytes(tmp_path / "again") == _bytes(ours)


def test_settings_are_those_of_the_injected_model(load, adapted, tmp_path):
    model = adapted("lora", "static", alpha=6.0, layers=[1], dropout=0.25)
    ours = save_adapter(model, tmp_path)
    config = PeftModel.from_pretrained(load(), ours).peft_config["default"]
    assert (config.r, config.alpha, config.dropout, config.layers_to_transform) == (3, 6.0, 0.25, [1])
    assert config.gate["kind"] == "static"
