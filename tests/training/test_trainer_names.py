"""Unknown names in the Trainer's settings are refused with the closest accepted one."""

from types import SimpleNamespace

import pytest

from gatera_lightning.training.trainer_names import name_problems


@pytest.mark.parametrize(
    ("setting", "value", "meant"),
    [
        ("strategy", "ddpp", "ddp"),
        ("strategy", "deepsped", "deepspeed"),
        ("accelerator", "gpuu", "gpu"),
        ("accelerator", "cdua", "cuda"),
        ("profiler", "smple", "simple"),
        ("profiler", "none of them", None),
    ],
)
def test_unknown_name_is_refused(setting, value, meant):
    (problem,) = name_problems(SimpleNamespace(**{setting: value}))
    assert problem.startswith(f"trainer.{setting}: {value!r} is unknown; accepted: ")
    assert problem.endswith(f"; did you mean {meant!r}?") == (meant is not None)


def test_known_names_and_objects_pass():
    for strategy, accelerator, profiler in (
        ("auto", "auto", None),
        ("ddp", "cpu", "simple"),
        ("ddp_spawn", "gpu", "advanced"),
        ("ddp_find_unused_parameters_true", "cuda", "pytorch"),
        (object(), object(), object()),
    ):
        trainer = SimpleNamespace(strategy=strategy, accelerator=accelerator, profiler=profiler)
        assert name_problems(trainer) == []
