"""What PEFT promises for a method, for every update and gate: PEFT's and Transformers' own calls alone."""

import copy

import pytest
import torch
from adapted_layers import METHODS
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError, adapter_parameters, position_mask
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.peft import GateRAConfig, GateRALinear

TARGETS = ["q_proj", "down_proj"]


def gatera(update="hira", gate="token", **settings):
    return GateRAConfig(
        **(
            {"update": update, "gate": gate, "r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
            | settings
        )
    )


@pytest.fixture
def load(backbone_folder):
    """Return a function that loads another copy of the backbone."""
    return lambda **settings: AutoModelForCausalLM.from_pretrained(backbone_folder, **settings)


@pytest.fixture
def trained(load, randomize):
    """Return a function that adapts the backbone by ``get_peft_model`` and perturbs the adapter."""
    return lambda *method, **settings: randomize(get_peft_model(load(), gatera(*method, **settings)))


LOADERS = {
    "from_pretrained": lambda load, folder: PeftModel.from_pretrained(load(), folder),
    "low_cpu_mem_usage": lambda load, folder: PeftModel.from_pretrained(
        load(), folder, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda load, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda load, folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda load, folder: (model := load()).load_adapter(folder) and model,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_saved_adapter_loads_exactly(load, trained, logits, tmp_path, update, gate, loader):
    model = trained(update, gate)
    model.save_pretrained(tmp_path)
    loaded = LOADERS[loader](load, tmp_path)
    # In the mapped file they would not be aligned, which changes the rounding of some matmuls.
    assert {p.data_ptr() % 64 for p in adapter_parameters(loaded).values()} == {0}
    expected = logits(model)
    assert not torch.equal(expected, logits(load()))
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_new_adapter_is_the_identity(load, logits, update, gate):
    model = get_peft_model(load(), gatera(update, gate))
    assert (logits(model) - logits(load())).abs().max() < (1e-6 if update == "dora" else 1e-12)


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_disabled_adapter_is_the_backbone_exactly(load, trained, logits, update, gate):
    model = trained(update, gate)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load()))
        assert not adapted_linears(model)
    assert not torch.equal(logits(model), logits(load()))


def test_adapter_with_a_position_gate_is_added_to_another_one(load, trained, logits):
    """One adapter for all tokens, and one that drafts: tokens outside of the mask have the first one only."""
    model = trained("hira", "token")
    alone = logits(model)
    model.add_adapter("draft", gatera("lora", "position", alpha=6.0))
    for name, parameter in model.named_parameters():
        if "draft" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    model.base_model.set_adapter(["default", "draft"])
    ids = torch.arange(12).reshape(2, 6)
    draft = torch.tensor([False] * 4 + [True] * 2)
    with torch.no_grad(), position_mask(model, draft):
        found = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(found[:, :4], alone[:, :4], rtol=0, atol=1e-5)  # summed in another order
    assert (found[:, 4:] - alone[:, 4:]).abs().max() > 1e-2
    with pytest.raises(RuntimeError, match="a position gate needs a mask"):
        model(input_ids=ids)


def test_adapters_are_switched_added_up_and_deleted(load, trained, logits, tmp_path, randomize):
    trained().save_pretrained(tmp_path / "one")
    trained("lora", "static").save_pretrained(tmp_path / "two")
    one, two = (logits(PeftModel.from_pretrained(load(), tmp_path / name)) for name in ("one", "two"))
    both = PeftModel.from_pretrained(load(), tmp_path / "one", adapter_name="first")
    both.load_adapter(tmp_path / "two", "second")
    assert torch.equal(logits(both), one)
    both.set_adapter("second")
    assert torch.equal(logits(both), two)
    both.base_model.set_adapter(["first", "second"])
    summed = logits(both)
    assert not torch.equal(summed, one)
    assert not torch.equal(summed, two)
    both.delete_adapter("second")
    assert torch.equal(logits(both), one)


def test_sum_of_adapters_is_the_sum_of_their_updates(load, randomize):
    torch.manual_seed(0)
    model = get_peft_model(load(), gatera("lora", "token"), adapter_name="first")
    model.add_adapter("second", gatera("hira", "static", r=2))
    layer = next(m for m in model.modules() if isinstance(m, GateRALinear))
    x = torch.randn(2, 5, layer.in_features)
    outputs = []
    for names in (["first"], ["second"], ["first", "second"]):
        layer.set_adapter(names)
        randomize(layer, seed=len(outputs)) if len(names) == 1 else None
        outputs.append(layer(x).detach())
    base = layer.base_layer(x).detach()
    assert torch.allclose(outputs[2] - base, outputs[0] + outputs[1] - 2 * base, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_merge_and_unmerge(load, trained, logits, update, gate):
    model = trained(update, gate)
    expected, before = logits(model), copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter(safe_merge=True)
    assert not adapted_linears(model)
    assert (logits(model) - expected).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert all(
        torch.equal(value, before[name]) for name, value in model.get_base_model().state_dict().items()
    )
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-5
    assert merged.state_dict().keys() == load().state_dict().keys()


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_token_gate_refuses_to_merge(load, trained, logits, update):
    model = trained(update, "token")
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'token' gate, whose value differs between tokens"):
            merge()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), logits(load()))


def test_merge_refuses_values_that_are_not_finite(trained, logits):
    model = trained("lora", "none")
    layer = next(m for m in model.modules() if isinstance(m, GateRALinear))
    with torch.no_grad():
        layer.update.b[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_training_moves_only_the_adapter(load, update, gate):
    model = get_peft_model(load(), gatera(update, gate)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    ids = torch.arange(12).reshape(2, 6)
    for _ in range(2):  # B starts at zero, so A and the gate get a gradient from the second step on
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".gatera_" in name}


def test_trainable_parameters_are_counted(load):
    model = get_peft_model(load(), gatera())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in adapter_parameters(model).values())
    assert total == trainable + sum(p.numel() for p in load().parameters())


def test_modules_to_save_are_trained_and_saved(load, logits, tmp_path):
    model = get_peft_model(load(), gatera(modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head.modules_to_save" in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), logits(model))
    assert not torch.equal(logits(model), logits(load()))


def test_rows_of_tokens_are_trained_and_saved(load, logits, tmp_path):
    model = get_peft_model(load(), gatera(trainable_token_indices=[3, 5]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                assert parameter.requires_grad
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), logits(model))
    assert not torch.equal(logits(model), logits(load()))


def test_patterns_choose_layers_ranks_and_scales(load):
    model = get_peft_model(
        load(),
        gatera(
            "lora",
            target_modules="all-linear",
            exclude_modules=["o_proj"],
            rank_pattern={"down_proj": 5},
            alpha=4.0,
            alpha_pattern={"layers.1.self_attn.q_proj": 9.0},
        ),
    )
    found = {
        name.removeprefix("base_model.model."): layer.config for name, layer in adapted_linears(model).items()
    }
    assert len(found) == 2 * 6
    assert not any("o_proj" in name or "lm_head" in name for name in found)
    assert {name for name, config in found.items() if config.rank == 5} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    }
    assert {name for name, config in found.items() if config.scale == 3.0} == {
        "model.layers.1.self_attn.q_proj"
    }
    only = get_peft_model(load(), gatera(layers_to_transform=[1]))
    assert all(".layers.1." in name for name in adapted_linears(only))


def test_usual_modules_are_adapted_by_default(load):
    names = adapted_linears(get_peft_model(load(), gatera(target_modules=None)))
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_stays_wide_over_a_16_bit_backbone(load, dtype):
    model = get_peft_model(load(dtype=dtype), gatera())
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    ids = torch.arange(12).reshape(2, 6)
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert model.to(torch.float64)(input_ids=ids).logits.dtype == torch.float64


def test_gradient_checkpointing_changes_no_gradient(load, trained):
    ids, found = torch.arange(12).reshape(2, 6), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = trained().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_generation_is_that_of_the_injected_model(load, trained, tmp_path):
    model = trained().eval()
    model.save_pretrained(tmp_path)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(6).reshape(1, 6)
    text = model.generate(input_ids=ids, **settings)
    for loader in LOADERS.values():
        assert torch.equal(loader(load, tmp_path).generate(input_ids=ids, **settings), text)


def test_injection_without_a_peft_model(load, logits, trained):
    model = trained()
    bare = inject_adapter_in_model(gatera(), load())
    for ours, theirs in zip(
        adapter_parameters(bare).values(), adapter_parameters(model).values(), strict=True
    ):
        ours.data.copy_(theirs)
    assert torch.equal(logits(bare), logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"update": "hora"},
            "update: 'hora' is unknown; accepted: lora, dora, hira",
        ),
        (
            {"gate": "tokn"},
            "gate: 'tokn' is unknown; accepted: none, static, token",
        ),
        ({"gate": {"kind": "token", "biass": 1}}, "a 'token' gate has no biass"),
        ({"r": 0}, "r: 0 is not a rank"),
        ({"r": True}, "r: True is not a rank"),
        ({"alpha": 2.0}, "alpha: 2.0, but update 'hira' has no scale"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj: r: 0 is not a rank"),
        (
            {"target_modules": "q.*", "layers_to_transform": [0]},
            r"layers_to_transform: \[0\] with a target_modules",
        ),
        ({"layers_pattern": "layers"}, "layers_pattern: 'layers' without layers_to_transform"),
    ],
)
def test_bad_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        gatera(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding; accepted: linear layers"),
        ({"r": 40}, r"r: 40 exceeds .*q_proj \(32 -> 32\); accepted here: 1 to 32"),
    ],
)
def test_module_that_cannot_be_adapted_is_named(load, settings, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(load(), gatera(**settings))


def test_accelerate_trains_and_saves(load, logits, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = get_peft_model(load(), gatera())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.arange(12).reshape(2, 6)
    for _ in range(2):
        accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), logits(model))
    assert not torch.equal(logits(model), logits(load()))
