"""Mask embeddings and a sampler head are part of an adapter: listed, trained, saved, loaded and refused."""

import json

import pytest
import torch
from draft_folders import draft_folder
from safetensors.torch import load_file, save_file
from torch import nn

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    save_adapter,
)
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.adapters.injection import remove_adapters
from gatera_lightning.cli.main import main
from gatera_lightning.training.optimizer import parameter_groups

GATE = PositionGateConfig(mask_embeddings=3)
CONFIG = AdapterConfig(update="lora", gate=GATE, rank=4, target_modules="all-linear")
OWN = {
    "mask_drafts.embeddings": (3, 32),
    "mask_drafts.sampler_in": (32, 64),
    "mask_drafts.sampler_in_bias": (32,),
    "mask_drafts.sampler_out": (32, 32),
    "mask_drafts.sampler_out_bias": (32,),
}
IDS = torch.arange(24).reshape(3, 8)


def own_shapes(named):
    return {name: tuple(value.shape) for name, value in named.items() if "mask_drafts" in name}


def test_they_are_parameters_of_the_adapter(tiny_llama):
    without, model = tiny_llama(), tiny_llama()
    fewer = inject_adapters(
        without,
        AdapterConfig(update="lora", gate="position", rank=4, target_modules="all-linear"),
        torch.Generator().manual_seed(1),
    )
    report = inject_adapters(model, CONFIG, torch.Generator().manual_seed(1))
    parameters = adapter_parameters(model)
    assert own_shapes(parameters) == OWN
    size = sum(parameter.numel() for name, parameter in parameters.items() if name in OWN)
    assert (report.trainable - fewer.trainable, report.frozen) == (size, fewer.frozen)
    assert report.layers == fewer.layers  # the sampler head is no layer to adapt
    for name, parameter in adapter_parameters(without).items():
        assert torch.equal(parameter, parameters[name])
    assert parameter_groups(model).keys() == {"update"}
    assert parameter_groups(model)["update"].keys() == parameters.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == parameters.keys()
    again = tiny_llama()
    inject_adapters(again, CONFIG, torch.Generator().manual_seed(1))
    assert all(torch.equal(p, parameters[name]) for name, p in adapter_parameters(again).items())
    remove_adapters(model)
    assert not hasattr(model, "mask_drafts")


def test_folder_keeps_them(tiny_llama, tmp_path, randomize):
    model = tiny_llama()
    inject_adapters(model, CONFIG)
    randomize(model)
    save_adapter(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert own_shapes(stored) == {f"base_model.model.{name}": shape for name, shape in OWN.items()}
    description = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert description["gate"] == {"kind": "position", "lr_multiplier": 1.0, "mask_embeddings": 3}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "--draft folder" in card
    assert "from peft" not in card
    again = tiny_llama()
    assert load_adapter(again, tmp_path / "saved").gate == GATE
    expected = adapter_parameters(model)
    assert all(torch.equal(p, expected[name]) for name, p in adapter_parameters(again).items())
    other = tiny_llama()
    inject_adapters(other, AdapterConfig(update="lora", gate="position", rank=4, target_modules="all-linear"))
    with pytest.raises(AdapterFileError, match=r"5 unexpected tensors \(mask_drafts\.embeddings, …\)"):
        load_adapter(other, tmp_path / "saved")


def test_rows_of_a_draft_adapter_read_mask_embeddings(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    before = set(dict(model.named_parameters()))
    draft = load_draft_adapter(model, draft_folder(tiny_llama(), tmp_path / "draft", gate=GATE))
    seen = []
    with torch.no_grad():
        expected = model(IDS).logits
        with draft.on_last(2, (3, 8)):
            hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            found = model(IDS).logits
            hook.remove()
        assert torch.equal(found[:, :6], expected[:, :6])
        assert torch.equal(seen[0][:, :6], model.model.embed_tokens(IDS[:, :6]))
        assert torch.equal(seen[0][:, 6:], draft.mask_drafts.embeddings[:2].expand(3, -1, -1))
        assert torch.equal(model(IDS).logits, expected)
    assert set(dict(model.named_parameters())) == before  # they are no part of the model


def change(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): t for name, t in load_file(path).items()}
    edit(tensors)
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, path, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["gatera"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("masks", "edit", "message"),
    [
        (3, lambda t: t.pop("mask_drafts.embeddings"), r"\.embeddings has shape None, and .*\(3, 32\)"),
        (3, lambda t: t.update({"mask_drafts.more": torch.ones(1)}), r"mask_drafts\.more has shape \(1,\)"),
        (3, lambda t: t["mask_drafts.sampler_out"].fill_(torch.nan), "NaN"),
        (0, lambda t: t.update({"mask_drafts.embeddings": torch.ones(3, 32)}), "unexpected tensors"),
    ],
    ids=["missing", "more", "nan", "none"],
)
def test_tensors_that_do_not_fit_are_refused(tiny_llama, tmp_path, masks, edit, message):
    gate = PositionGateConfig(mask_embeddings=masks)
    folder = change(draft_folder(tiny_llama(), tmp_path / "draft", gate=gate), edit)
    with pytest.raises(AdapterFileError, match=message):
        load_draft_adapter(tiny_llama().eval(), folder)


@pytest.mark.parametrize("masks", [-1, 1.5, True, "3"])
def test_number_that_cannot_work_is_refused(masks):
    (problem,) = AdapterConfig(gate=PositionGateConfig(mask_embeddings=masks)).problems()
    assert problem.startswith(f"adapter.gate.mask_embeddings: {masks!r}; accepted: an integer of at least 0")


def test_module_without_an_output_head_is_refused_and_unchanged(tiny_llama):
    model = nn.Sequential(nn.Linear(4, 4))
    config = AdapterConfig(update="lora", gate=GATE, rank=2, target_modules="all-linear")
    with pytest.raises(ConfigError, match="mask_embeddings: 3, but Sequential has no output head"):
        inject_adapters(model, config)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("form", ["peft", "lora"])
def test_peft_has_no_such_method(tiny_llama, tmp_path, capsys, form):
    folder = draft_folder(tiny_llama(), tmp_path / "draft", gate=GATE)
    out = tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out), "--format", form]) != 0
    printed = " ".join(capsys.readouterr().err.split())
    assert f"--format {form}" in printed
    assert "has 3 mask embeddings and a sampler head, and PEFT's own methods have none" in printed
    assert not out.exists()


def test_export_as_our_own_folder_keeps_them_and_peft_refuses_it(tiny_llama, tmp_path):
    folder, out = draft_folder(tiny_llama(), tmp_path / "draft", gate=GATE), tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    first, second = (load_file(each / "adapter_model.safetensors") for each in (folder, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    from peft import PeftModel

    import gatera_lightning.peft  # noqa: F401

    with pytest.raises(ConfigError, match=r"gate.mask_embeddings: 3, which PEFT does not train or load"):
        PeftModel.from_pretrained(tiny_llama(), out)
