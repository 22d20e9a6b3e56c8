"""Numbers of the Trainer that cannot work are refused with what is accepted."""

import math
from datetime import timedelta

import lightning as L
import pytest

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError
from gatera_lightning.cli.main import main
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.training.number_checks import (
    device_problems,
    number_problems,
    seed_problems,
    time_problems,
)
from gatera_lightning.training.trainer_checks import check_trainer

REFUSED = {
    "accumulate_grad_batches": (0, -2, True),
    "check_val_every_n_epoch": (0, -1),
    "gradient_clip_val": (-1, -0.5, math.nan, math.inf),
    "limit_train_batches": (0, 0.0, -1, 1.5, math.nan),
    "limit_val_batches": (-1, 1.5, -0.5),
    "limit_test_batches": (-1, 2.5),
    "limit_predict_batches": (-1, math.nan),
    "log_every_n_steps": (0, -1),
    "max_epochs": (0, -2),
    "max_steps": (0, -2),
    "min_epochs": (-1,),
    "min_steps": (-5,),
    "num_nodes": (0, -1),
    "num_sanity_val_steps": (-2,),
    "overfit_batches": (1, 0.5, -1),
    "reload_dataloaders_every_n_epochs": (1, -1),
    "val_check_interval": (0, 0.0, -1, 1.5, math.nan),
}
ACCEPTED = {
    "accumulate_grad_batches": (1, 8),
    "check_val_every_n_epoch": (None, 2),
    "gradient_clip_val": (None, 0, 0.0, 1.0, 3),
    "limit_train_batches": (None, 1, 7, 0.5, 1.0),
    "limit_val_batches": (None, 0, 0.0, 2, 1.0),
    "log_every_n_steps": (None, 1),
    "max_epochs": (None, -1, 3),
    "max_steps": (-1, 10),
    "num_sanity_val_steps": (None, -1, 0, 2),
    "overfit_batches": (0, 0.0),
    "val_check_interval": (None, 1, 50, 0.25, 1.0, "00:10:00"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_number_without_a_sensible_effect_is_refused(name, value):
    (problem,) = number_problems({name: value}, "fit")
    assert problem.startswith(f"trainer.{name}: {value!r}; accepted: ")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ACCEPTED for value in ACCEPTED[name]])
def test_number_that_works_is_accepted(name, value):
    assert number_problems({name: value}, "fit") == []


def test_trainers_own_defaults_are_accepted(tmp_path):
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    settings = {name: getattr(trainer, name, None) for name in REFUSED}
    assert number_problems(settings, "fit") == []


@pytest.mark.parametrize(
    ("stage", "name"),
    [("validate", "limit_val_batches"), ("test", "limit_test_batches"), ("predict", "limit_predict_batches")],
)
def test_evaluation_of_nothing_is_refused(stage, name):
    assert number_problems({name: 0}, "fit") == []
    (problem,) = number_problems({name: 0}, stage)
    assert problem.startswith(f"trainer.{name}: 0; accepted: a number of batches of at least 1")


@pytest.mark.parametrize("time", ["00:00:00:00", "1 hour", {"hours": 0}, {"years": 1}, timedelta(), 3])
def test_time_that_leaves_no_step_is_refused(time):
    (problem,) = time_problems(time)
    assert problem.startswith(f"trainer.max_time: {str(time) if isinstance(time, timedelta) else repr(time)}")
    assert "accepted: a time above 0, as DD:HH:MM:SS or {hours: 1}, or null" in problem


@pytest.mark.parametrize("time", ["00:00:00:01", {"minutes": 1}, timedelta(seconds=1), None])
def test_time_is_accepted(time):
    assert time_problems(time) == []


@pytest.mark.parametrize("devices", [0, "0", -2, "-3", [], ""])
def test_no_devices_are_refused(devices):
    (problem,) = device_problems(devices)
    assert problem.startswith(f"trainer.devices: {devices!r}; accepted: ")


@pytest.mark.parametrize("devices", [1, "2", -1, "-1", "auto", [0], "0,1", "0,"])
def test_devices_are_accepted(devices):
    assert device_problems(devices) == []


@pytest.mark.parametrize("seed", [-1, 2**32, -(2**70), 2**70])
def test_seed_out_of_range_is_refused(seed):
    (problem,) = seed_problems(seed)
    assert problem == f"seed_everything: {seed}; accepted: an integer from 0 to 4294967295, true or false"


@pytest.mark.parametrize("seed", [0, 2**32 - 1, True, False, None])
def test_seed_is_accepted(seed):
    assert seed_problems(seed) == []


def test_trainer_of_a_script_is_checked(tmp_path):
    trainer = L.Trainer(accelerator="cpu", gradient_clip_val=-1, overfit_batches=2, default_root_dir=tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_trainer(trainer, "fit", DecodingConfig(), BackboneConfig(id="here"), AdapterConfig())
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "trainer.gradient_clip_val",
        "trainer.overfit_batches",
    ]


def test_command_line_reports_all_of_them(tmp_path, monkeypatch, capsys, tiny_backbone):
    from tiny_backbone import tiny_args

    monkeypatch.chdir(tmp_path)
    flags = {
        "seed_everything": "-1",
        "trainer.gradient_clip_val": "-1",
        "trainer.limit_train_batches": "0",
        "trainer.val_check_interval": "0",
        "trainer.max_epochs": "0",
        "trainer.devices": "0",
        "trainer.max_time": "00:00:00:00",
        "trainer.num_nodes": "0",
        "trainer.log_every_n_steps": "0",
        "model.optimizer.weight_decay": "1e9",
        "watchdog.factor": ".nan",
        "watchdog.seconds": "-1",
        "early_stopping.min_delta": "-1",
        "checkpoint.save_top_k": "-3",
    }
    args = ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone)]
    assert main([*args, *(f"--{name}={value}" for name, value in flags.items())]) == 2
    lines = [line.removeprefix("  - ") for line in capsys.readouterr().err.splitlines()[1:]]
    named = {line.partition(":")[0] for line in lines}
    assert named == flags.keys() - {"watchdog.seconds"}  # a section reports its first problem
