"""Settings of the Trainer that contradict each other or have no effect are refused before weights load."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError, GateRAModule
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.early_stopping import OptionalEarlyStopping
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.datamodules import CommonsenseDataModule
from gatera_lightning.objectives import GateEntropy, GateSparsity, NextToken, Objective, Term


class Own(Callback):
    """A user's callback, which may log or stop."""


class OwnModule(GateRAModule):
    """A user's module, which logs the loss of a validation of its own, and may stop."""

    def on_train_epoch_end(self):
        self.log("val/loss", 1.0)


class LogsValLoss(Callback):
    """A user's callback, which logs the loss of a validation of its own."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("val/loss", 1.0)


class OwnValidation(CommonsenseDataModule):
    """A user's data module, which reads no validation split but has a loader for validation."""

    def splits(self, stage):
        return ["train"]

    def val_dataloader(self):
        return self._likelihood_loader("train", self.train_on, all_candidates=False)


@dataclass(frozen=True)
class OwnObjective(Objective):
    """A user's objective, whose term has a name close to one of this package."""

    def terms(self, model, batch, gates):
        return {"task_loss_2": Term(torch.zeros(()), 1, 1.0)}


class CountsValidations(Callback):
    count = 0

    def on_validation_end(self, trainer, pl_module):
        self.count += 1


class OfTheUser(CheckpointIO):
    """A plugin that keeps nothing."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        pass

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return {}

    def remove_checkpoint(self, path):
        pass


class ChangesLightnings(TorchCheckpointIO):
    """Lightning's way of writing, changed."""


class ChangesOurs(AtomicCheckpointIO):
    """The atomic way of writing, changed."""


@pytest.fixture
def fit(tiny_backbone, tmp_path):
    """``fit(*callbacks, **settings)``: a run of 2 steps of 6 in an epoch, with one batch of validation."""

    def run(*callbacks, kind=GateRAModule, objectives=None, data_kind=None, **settings):
        trainer = tiny_trainer(tmp_path, *callbacks, **({"max_steps": 2, "limit_val_batches": 1} | settings))
        tiny, data = tiny_module(tiny_backbone), tiny_data(tiny_backbone)
        if data_kind is not None:
            given = {name: value for name, value in data.hparams.items() if name != "held_out"}
            tokenizer, data = data.tokenizer, data_kind(**given)
            data.connect(tokenizer)
        module = kind(
            backbone=tiny.backbone, adapter=tiny.adapter, optimizer=tiny.optimizer, objectives=objectives
        )
        trainer.fit(module, datamodule=data)
        return trainer

    return run


@pytest.fixture
def refused(fit, monkeypatch):
    """``refused(*callbacks, **settings)``: the one message of a run that loads no weights."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )

    def run(*callbacks, **settings):
        with pytest.raises(ConfigError) as caught:
            fit(*callbacks, **settings)
        (problem,) = caught.value.problems
        return problem

    return run


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"min_steps": 9}, "trainer.min_steps: 9, but trainer.max_steps is 2; accepted: at most 2"),
        ({"min_epochs": 3, "max_epochs": 2}, "trainer.min_epochs: 3, but trainer.max_epochs is 2;"),
        ({"min_steps": 1}, "trainer.min_steps: 1, but nothing ends the run before its last step;"),
        ({"min_epochs": 2, "max_epochs": 3}, "trainer.min_epochs: 2, but nothing ends the run before"),
        (
            {"max_steps": -1, "max_epochs": 1, "min_steps": 7, "max_time": "00:01:00:00"},
            "trainer.min_steps: 7, but the run has 6 steps; accepted: at most 6",
        ),
        (
            {"max_steps": -1, "max_epochs": 2, "check_val_every_n_epoch": 3},
            "trainer.check_val_every_n_epoch: 3, but the run has 2 epochs, so that it never validates",
        ),
        (
            {"max_steps": 4, "check_val_every_n_epoch": 2},
            "trainer.check_val_every_n_epoch: 2, but the run ends at trainer.max_steps 4",
        ),
        ({"plugins": [AsyncCheckpointIO()]}, "trainer.plugins: AsyncCheckpointIO, but checkpoints"),
        ({"plugins": [OfTheUser()]}, "trainer.plugins: OfTheUser, but checkpoints"),
        ({"plugins": [ChangesLightnings()]}, "trainer.plugins: ChangesLightnings, but checkpoints"),
        (
            {"strategy": SingleDeviceStrategy("cpu", checkpoint_io=OfTheUser())},
            "trainer.plugins: OfTheUser, but checkpoints",
        ),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 4}, "trainer.limit_train_batches: 3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_setting_without_effect_is_refused(refused, settings, start):
    assert refused(**settings).startswith(start)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_steps": 1, "max_time": "00:01:00:00"},
        {"min_steps": 2},
        {"max_steps": -1, "min_epochs": 2, "max_epochs": 2},
        {"kind": OwnModule, "min_steps": 1},
        {"max_steps": -1, "max_epochs": 1, "check_val_every_n_epoch": 2, "limit_val_batches": 0},
        {"check_val_every_n_epoch": None, "val_check_interval": 2},
        {"plugins": [ChangesOurs()]},
    ],
    ids="-".join,
)
def test_setting_with_effect_is_accepted(fit, settings):
    fit(**settings)


@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (EarlyStopping("val/los"), "trainer.callbacks: EarlyStopping"),
        (ModelCheckpoint(monitor="val/los"), "trainer.callbacks: ModelCheckpoint"),
        (AdapterCheckpoint(monitor="val/los"), "checkpoint"),
        (OptionalEarlyStopping(patience=1, monitor="val/los"), "early_stopping"),
    ],
    ids=["EarlyStopping", "ModelCheckpoint", "AdapterCheckpoint", "OptionalEarlyStopping"],
)
def test_monitor_that_is_never_logged_is_refused(refused, callback, name):
    problem = refused(callback)
    assert problem.startswith(f"{name}.monitor: 'val/los' is never logged; accepted: train/loss")
    assert problem.endswith("did you mean 'val/loss'?")


@pytest.mark.parametrize("kind", ["lightning", "own"])
def test_early_stopping_without_validation_is_refused(refused, kind):
    callback = EarlyStopping("val/loss") if kind == "lightning" else OptionalEarlyStopping(patience=1)
    assert ".monitor: 'val/loss' needs a validation, and this run has none" in refused(
        callback, limit_val_batches=0
    )


def test_callbacks_that_work_are_accepted(fit):
    fit(
        EarlyStopping("train/loss", check_on_train_epoch_end=True),
        OptionalEarlyStopping(),
        AdapterCheckpoint(),
        max_steps=-1,
        max_epochs=1,
    )


@pytest.mark.parametrize("own", [Own(), LambdaCallback()], ids=["subclass", "functions"])
def test_callback_of_the_user_may_log_and_stop(fit, own):
    fit(own, ModelCheckpoint(monitor="own/value", every_n_train_steps=100), min_steps=1)


def test_callback_of_the_user_may_log_the_validation_loss(fit):
    settings = {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 0}
    fit(LogsValLoss(), EarlyStopping("val/loss", check_on_train_epoch_end=True), **settings)


def test_module_of_the_user_may_log_the_validation_loss(fit):
    settings = {"max_steps": -1, "max_epochs": 1, "limit_val_batches": 0}
    fit(EarlyStopping("val/loss", check_on_train_epoch_end=True), kind=OwnModule, **settings)


def test_data_module_of_the_user_may_have_a_validation_of_its_own(fit):
    trainer = fit(EarlyStopping("val/loss"), data_kind=OwnValidation, max_steps=-1, max_epochs=1)
    assert "val/loss" in trainer.callback_metrics


def test_loader_without_validation_has_any_interval(tiny_backbone, tmp_path):
    data = tiny_data(tiny_backbone)
    data.setup("fit")
    settings = {"max_steps": -1, "max_epochs": 2, "check_val_every_n_epoch": 5, "limit_val_batches": 1}
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.fit(tiny_module(tiny_backbone), train_dataloaders=data.train_dataloader())
    assert trainer.current_epoch == 2


@pytest.mark.parametrize("monitor", ["step", "epoch"])
def test_steps_and_epochs_are_monitored(fit, monitor):
    checkpoint = ModelCheckpoint(monitor=monitor, mode="max", every_n_train_steps=1)
    fit(checkpoint)
    assert checkpoint.best_model_score == {"step": 2, "epoch": 0}[monitor]


@pytest.mark.parametrize(
    ("objective", "term"),
    [
        (OwnObjective(), "task_loss_2"),
        (GateSparsity(0.1), "gate_openness"),
        (GateSparsity(0.1), "gate_skipped"),
    ],
    ids=["own", "openness", "skipped"],
)
def test_terms_of_the_objectives_are_monitored(fit, objective, term):
    checkpoint = ModelCheckpoint(monitor=f"train/{term}", every_n_train_steps=1)
    fit(checkpoint, objectives=[NextToken(), objective])
    assert checkpoint.best_model_score is not None


@pytest.mark.parametrize("meant", ["train/gate_openness", "train/loss"])
def test_misspelt_term_is_refused(refused, meant):
    objectives = [NextToken(), GateEntropy(0.01), GateSparsity(0.1)]
    problem = refused(ModelCheckpoint(monitor=meant[:-1]), objectives=objectives)
    assert f"{meant[:-1]!r} is never logged" in problem
    assert problem.endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize(("steps", "named"), [(4, True), (6, False)])
def test_validation_after_the_last_step_is_named(fit, caplog, steps, named):
    counter = CountsValidations()
    fit(counter, max_steps=steps)
    assert counter.count == (0 if named else 1)
    assert ("before its first validation: it never validates" in caplog.text) == named


@pytest.mark.parametrize(("every", "named"), [(3, True), (2, False)])
def test_run_too_short_for_its_log_is_named(fit, tmp_path, caplog, every, named):
    fit(logger=CSVLogger(tmp_path), log_every_n_steps=every)
    assert ("trainer.log_every_n_steps: 3, but the run has 2 steps" in caplog.text) == named
