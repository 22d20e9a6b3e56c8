"""A run that trains a draft adapter over a trained GateRA adapter: from the adapter's folder to its text."""

import shutil

import pytest
import torch
from draft_folders import ALL_SEVEN
from gate_reports import save_random_adapter
from terminal_models import GreedyReference, escape, talkative_backbone
from tiny_backbone import tiny_data, tiny_trainer

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    GateRAModule,
    OptimizerConfig,
    adapter_parameters,
    load_adapter,
)
from gatera_lightning.adapters.serialization import read_adapter
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.cli.main import main
from gatera_lightning.errors import CheckpointError
from gatera_lightning.objectives import SelfDraft


@pytest.fixture(scope="module")
def folders(tiny_backbone, tmp_path_factory):
    """A backbone, two adapters with token gates, and a run of two steps that drafts for the first one."""
    root = tmp_path_factory.mktemp("tuned")
    talkative_backbone(tiny_backbone, root / "backbone")
    save_random_adapter(root / "adapter", root / "backbone")
    save_random_adapter(root / "other", root / "backbone", seed=1)
    fit(root, root / "run", AdapterCheckpoint(every_n_steps=1), max_steps=2)
    return root


def draft_module(folders, tuned="adapter", **adapter):
    settings = {"update": "lora", "gate": "position", "rank": 4, "target_modules": ALL_SEVEN}
    return GateRAModule(
        backbone=BackboneConfig(
            id=str(folders / "backbone"),
            dtype="float32",
            adapter=None if tuned is None else str(folders / tuned),
        ),
        adapter=AdapterConfig(**(settings | adapter)),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        objectives=[SelfDraft([1, 2], steps_per_size=2)],
    )


def fit(folders, root, *callbacks, tuned="adapter", ckpt_path=None, **settings):
    import lightning as L

    L.seed_everything(3)
    module, data = draft_module(folders, tuned), tiny_data(folders / "backbone", train_on="all")
    trainer = tiny_trainer(root, *callbacks, **({"limit_val_batches": 2, "val_check_interval": 2} | settings))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


def last(folders):
    (checkpoint,) = (folders / "run").rglob("last.ckpt")
    return checkpoint


def test_checkpoints_hold_the_draft_adapter_alone(folders):
    checkpoint = torch.load(last(folders), weights_only=True)
    stored, tensors = read_adapter(last(folders).with_suffix(""))
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in tensors}
    assert len(tensors) == 2 * 2 * len(ALL_SEVEN)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in tensors} == {"update"}
    assert stored.config.gate.kind == "position"
    digest = stored.origin["adapter_sha256"]
    assert len(digest) == 64
    assert checkpoint["backbone"]["adapter_sha256"] == digest
    # Without a trained adapter, the same weights have the same fingerprint and no digest.
    module = draft_module(folders, tuned=None)
    module.configure_model()
    description = {}
    module.on_save_checkpoint(description)
    assert description["backbone"]["fingerprint"] == stored.origin["fingerprint"]
    assert "adapter_sha256" not in description["backbone"]


def test_trained_adapter_is_not_trained_and_the_resumed_run_is_bit_equal(folders, tmp_path):
    whole, trainer = fit(folders, tmp_path / "whole")
    assert 0 <= float(trainer.callback_metrics["val/acceptance_1"]) <= 1
    shutil.copytree(folders / "adapter", tmp_path / "moved")
    resumed, _ = fit(folders, tmp_path / "resumed", tuned=tmp_path / "moved", ckpt_path=str(last(folders)))
    for (name, ours), theirs in zip(
        adapter_parameters(resumed.model).items(), adapter_parameters(whole.model).values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad
    frozen = dict(whole.model.named_parameters())
    _, tensors = read_adapter(folders / "adapter")
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".update.", 1) if ".update." in name else name.rsplit(".gate.", 1)
        part = "update" if ".update." in name else "gate"
        parameter = frozen.get(f"{layer}.base.{part}.{kind}", frozen.get(name))
        assert torch.equal(parameter, tensor), name
        assert not parameter.requires_grad


@pytest.mark.parametrize("tuned", ["other", None])
def test_another_trained_adapter_cannot_resume(folders, tmp_path, tuned):
    with pytest.raises(CheckpointError, match=r"model\.backbone\.adapter is another one here"):
        fit(folders, tmp_path, tuned=tuned, ckpt_path=str(last(folders)))


def test_other_adapters_over_a_trained_one_are_refused_before_weights_load(folders, tmp_path):
    (gate, over) = draft_module(folders, gate="none").problems()
    assert gate.startswith("model.adapter.gate: 'none', but SelfDraft trains")
    assert over.endswith(
        "with adapter.update 'lora' and adapter.gate 'none'; accepted over a trained adapter: update lora "
        "and gate position, a draft adapter, or backbone.adapter null"
    )
    (over,) = draft_module(folders, update="hira").problems()
    assert "with adapter.update 'hira' and adapter.gate 'position'" in over
    (missing,) = draft_module(folders, tuned="nowhere").problems()
    assert missing.startswith("model.backbone.adapter: ")
    assert "adapter_config.json is missing" in missing
    (draft,) = draft_module(folders, tuned=last(folders).with_suffix("")).problems()
    assert "a 'position' gate takes a mask of the tokens" in draft


def test_drafts_give_the_text_of_the_tuned_model(folders, capsys):
    prompts = ["What do bees make?", "Tom has 3 boxes.\nHow many"]
    given = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    own = ["--template", "none", "--max_new_tokens", "30", "--dtype", "float32"]
    pair = ["--adapter", str(folders / "adapter"), "--draft", str(folders / "run")]
    assert main(["generate", *pair, *given, *own]) == 0
    out, err = capsys.readouterr()
    reference = GreedyReference(folders / "backbone", str(folders / "adapter"))
    assert out == "".join(escape(reference.text(prompt, 30)) + "\n" for prompt in prompts)
    plain = load_backbone(BackboneConfig(id=str(folders / "backbone"), dtype="float32"))
    tuned = load_backbone(BackboneConfig(id=str(folders / "backbone"), dtype="float32"))
    load_adapter(tuned, folders / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.allclose(plain(ids).logits, tuned(ids).logits, atol=0.1)
    assert "accepted drafts by depth: " in err
