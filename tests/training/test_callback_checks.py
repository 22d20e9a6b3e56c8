"""Callbacks that change the plan of a step are refused by name, before weights are loaded."""

import pytest
from lightning.pytorch import callbacks
from lightning.pytorch.tuner import Tuner
from tiny_backbone import tiny_args, tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError
from gatera_lightning.cli.main import main
from gatera_lightning.training.callback_checks import REFUSED_CALLBACKS, callback_problems


class OwnFinetuning(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


class Harmless(callbacks.Callback):
    pass


REFUSED = [
    callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
    callbacks.BatchSizeFinder(),
    callbacks.LearningRateFinder(),
    callbacks.BackboneFinetuning(),
    OwnFinetuning(),
    callbacks.StochasticWeightAveraging(1e-3),
]


@pytest.mark.parametrize("callback", REFUSED, ids=lambda callback: type(callback).__name__)
def test_callback_is_refused_before_weights_are_loaded(tiny_backbone, tmp_path, monkeypatch, callback):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    trainer = tiny_trainer(tmp_path, callback)
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks: {type(callback).__name__}: .*accepted: "):
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))


def test_other_callbacks_are_accepted():
    given = [Harmless(), callbacks.LearningRateMonitor(), callbacks.ModelCheckpoint(), callbacks.Timer()]
    assert callback_problems(given) == []


def test_refused_callbacks_exist():
    for name in REFUSED_CALLBACKS:
        assert hasattr(callbacks, name), name


@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_tuner_is_refused(tiny_backbone, tmp_path, monkeypatch, tune):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    tuner = Tuner(tiny_trainer(tmp_path))
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: .*Finder"):
        getattr(tuner, tune)(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))


def test_command_line_refuses_it(tiny_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scheduler = "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}"
    args = ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone)]
    assert main([*args, "--trainer.callbacks", f"[{scheduler}]"]) == 2
    assert "trainer.callbacks: GradientAccumulationScheduler: the totals" in capsys.readouterr().err
