"""Settings of the Trainer that contradict each other or have no effect are refused before weights load."""

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.early_stopping import OptionalEarlyStopping
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO


class Own(Callback):
    """A user's callback, which may log or stop."""


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

    def run(*callbacks, data=None, **settings):
        trainer = tiny_trainer(tmp_path, *callbacks, **({"max_steps": 2, "limit_val_batches": 1} | settings))
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone, **(data or {})))
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
        ({"min_steps": 2}, "trainer.min_steps: 2, but nothing ends the run before its last step;"),
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


def test_callback_of_the_user_may_log_and_stop(fit):
    fit(Own(), ModelCheckpoint(monitor="own/value", every_n_train_steps=100), min_steps=1)


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
