"""A run that trains a draft adapter: validation, exact resume, and what is refused."""

import math

import lightning as L
import pytest
import torch
from tiny_backbone import tiny_data, tiny_trainer

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    GateRAModule,
    OptimizerConfig,
    adapter_parameters,
    load_adapter,
)
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives import GateEntropy, MaskEmbeddings, NextToken, SelfDraft

MASKS = {
    "gate": PositionGateConfig(mask_embeddings=2),
    "objectives": [SelfDraft([1, 2], steps_per_size=2, form=MaskEmbeddings(0.5))],
}
"""Settings of a module that trains mask embeddings and a sampler head."""


def draft_module(folder, objectives=None, **adapter):
    return GateRAModule(
        backbone=BackboneConfig(id=str(folder), dtype="float32"),
        adapter=AdapterConfig(**({"update": "lora", "gate": "position", "rank": 4} | adapter)),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        objectives=[SelfDraft([1, 2], steps_per_size=2)] if objectives is None else objectives,
    )


class Sizes(L.Callback):
    """The block size and the loss of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((module.objectives[0].block_size, outputs["loss"].item()))


def fit(folder, root, *callbacks, ckpt_path=None, form=None, **settings):
    L.seed_everything(3)
    sizes, module, data = Sizes(), draft_module(folder, **(form or {})), tiny_data(folder, train_on="all")
    trainer = tiny_trainer(
        root, sizes, *callbacks, **({"limit_val_batches": 2, "val_check_interval": 2} | settings)
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer, sizes.seen


@pytest.mark.parametrize("form", [{}, MASKS], ids=["random_ids", "mask_embeddings"])
def test_run_validates_acceptance_and_resumes_bit_for_bit(tiny_backbone, tmp_path, form):
    whole, trainer, steps = fit(tiny_backbone, tmp_path / "whole", form=form)
    names = {"loss", "total_variation", "acceptance_1", "acceptance_2", "tokens_per_cycle"}
    assert {name for name in trainer.callback_metrics if name.startswith("val/")} == {
        f"val/{n}" for n in names
    }
    found = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in names}
    assert (found["loss"] == pytest.approx(2 * found["total_variation"])) == (form != MASKS)
    terms = {name for name in trainer.callback_metrics if name.startswith("train/")} - {"train/loss"}
    assert terms == {f"train/{name}" for name in whole.objectives[0].form.term_names}
    assert 0 <= found["acceptance_2"] <= found["acceptance_1"] <= 1
    assert [size for size, _ in steps] == [1, 1, 2, 2]
    fit(tiny_backbone, tmp_path / "half", AdapterCheckpoint(every_n_steps=1), max_steps=3, form=form)
    (checkpoint,) = (tmp_path / "half").rglob("last.ckpt")
    resumed, _, rest = fit(tiny_backbone, tmp_path / "resumed", ckpt_path=str(checkpoint), form=form)
    assert rest == steps[3:]
    for (name, ours), theirs in zip(
        adapter_parameters(resumed.model).items(), adapter_parameters(whole.model).values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    fresh = draft_module(tiny_backbone, **form)
    fresh.configure_model()
    for (name, first), last in zip(
        adapter_parameters(fresh.model).items(), adapter_parameters(whole.model).values(), strict=True
    ):
        assert not torch.equal(first, last), name  # every parameter is trained
    load_adapter(fresh.model, checkpoint.with_suffix(""))


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"gate": "position", "objectives": [SelfDraft([1, 2])]}, "adapter.gate.mask_embeddings: 0, but the"),
        (
            MASKS | {"objectives": [SelfDraft([1, 2], form=MaskEmbeddings(0.25))]},
            "_weight: 0.25}, but the run",
        ),
    ],
    ids=["other_form", "other_weight"],
)
def test_other_form_does_not_resume(tiny_backbone, tmp_path, here, message):
    fit(tiny_backbone, tmp_path, AdapterCheckpoint(every_n_steps=1), max_steps=1, form=MASKS)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    with pytest.raises(ConfigError, match=message):
        fit(tiny_backbone, tmp_path / "resumed", ckpt_path=str(checkpoint), form=here)


def test_loss_does_not_depend_on_micro_batches_without_noise(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.long))
    losses = []
    for accumulate in (1, 2):
        _, trainer, _ = fit(
            tiny_backbone, tmp_path, accumulate_grad_batches=accumulate, max_steps=2, limit_val_batches=0
        )
        losses.append(float(trainer.callback_metrics["train/total_variation"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_contradicting_settings_are_refused_before_weights_load(tiny_backbone, tmp_path):
    (problem,) = draft_module(tiny_backbone, objectives=[NextToken(), SelfDraft()]).problems()
    assert "NextToken gives none (NextToken, SelfDraft); accepted: objectives without NextToken" in problem
    (problem,) = draft_module(tiny_backbone, gate="none").problems()
    assert problem.startswith("model.adapter.gate: 'none', but SelfDraft trains")
    assert draft_module(tiny_backbone, objectives=[SelfDraft(), GateEntropy(0.0)]).problems() == []
    module, data = draft_module(tiny_backbone), tiny_data(tiny_backbone, packing=True, max_length=128)
    with pytest.raises(ConfigError, match=r"data\.packing: true, but SelfDraft needs one sequence per row"):
        tiny_trainer(tmp_path).fit(module, datamodule=data)
    assert module.model is None


def test_test_is_refused_because_nothing_gives_its_masks(tiny_backbone, tmp_path):
    module = draft_module(tiny_backbone)
    with pytest.raises(ConfigError, match=r"model\.adapter\.gate: a 'position' gate takes a mask"):
        tiny_trainer(tmp_path).test(module, datamodule=tiny_data(tiny_backbone), verbose=False)
    assert module.model is None


def test_acceptance_is_monitored_and_best_if_large(tiny_backbone, tmp_path):
    checkpoint = AdapterCheckpoint(monitor="val/acceptance_1")
    assert checkpoint.mode == "max"
    _, trainer, _ = fit(tiny_backbone, tmp_path, checkpoint, max_steps=2)
    assert checkpoint.best_model_score == trainer.callback_metrics["val/acceptance_1"]
    for monitor in ("val/acceptance_3", "val/accuracy_per_token", "train/task_loss"):
        other = AdapterCheckpoint(monitor=monitor)
        trainer = tiny_trainer(tmp_path / "other", other, limit_val_batches=1, val_check_interval=2)
        with pytest.raises(
            ConfigError, match=r"is never logged; accepted: train/loss, train/total_variation"
        ):
            trainer.fit(draft_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))


@pytest.mark.filterwarnings("error:The ``compute`` method")
def test_validation_runs_before_any_training(tiny_backbone, tmp_path):
    """Lightning validates in inference mode; no block of the data has 40 rows."""
    module = draft_module(tiny_backbone, [SelfDraft([40])])
    trainer = tiny_trainer(tmp_path, limit_val_batches=1)
    (found,) = trainer.validate(module, datamodule=tiny_data(tiny_backbone), verbose=False)
    assert 0 < found["val/total_variation"] < 1
    assert math.isnan(found["val/acceptance_40"])
    settings = {"num_sanity_val_steps": 1, "limit_val_batches": 1, "val_check_interval": 2}
    fit(tiny_backbone, tmp_path / "sanity", max_steps=2, **settings)
