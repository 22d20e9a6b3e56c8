"""A class that cannot be built is one problem of the configuration, with its setting."""

import sys
from pathlib import Path

import pytest

from gatera_lightning.cli.main import main

BROKEN = """
import lightning as L
class Raises(L.Callback):
    def __init__(self, speed: int = 1):
        raise {error}
"""


@pytest.fixture(autouse=True)
def own_modules(working_folder, monkeypatch):
    """Modules in the working folder are importable, and forgotten when the test ends."""
    monkeypatch.syspath_prepend(str(working_folder))
    yield
    sys.modules.pop("broken_callbacks", None)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("trainer.logger", "CometLogger", "comet-ml"),
        ("trainer.profiler", "{class_path: lightning.pytorch.profilers.XLAProfiler}", "torch_xla"),
        ("trainer.callbacks", "[{class_path: Timer, init_args: {duration: soon}}]", "not a valid duration"),
        (
            "trainer.callbacks",
            "[{class_path: TQDMProgressBar, init_args: {refresh_rate: 1}}, "
            "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {}}}]",
            "Empty",
        ),
    ],
    ids=["logger", "profiler", "callback", "second callback"],
)
def test_class_of_lightning_that_cannot_be_built(fit, problems, no_loading, setting, value, reason):
    if reason in ("comet-ml", "torch_xla"):
        sys_modules_lack(reason.replace("-", "_"))
    (problem,) = problems(*fit, f"--{setting}", value)
    assert problem.startswith(setting)
    assert " cannot be built: " in problem
    assert reason in problem
    assert "Union subtypes" not in problem
    assert "\n" not in problem


def sys_modules_lack(name):
    import importlib.util

    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")


@pytest.mark.parametrize(
    "error", ["KeyError('speed')", "ImportError('no engine')", "ZeroDivisionError('a\\nb')"]
)
def test_own_class_that_cannot_be_built(fit, problems, no_loading, error):
    Path("broken_callbacks.py").write_text(BROKEN.format(error=error))
    (problem,) = problems(*fit, "--trainer.callbacks", "[{class_path: broken_callbacks.Raises}]")
    assert problem.startswith("trainer.callbacks.0: broken_callbacks.Raises cannot be built: ")


def test_dry_run_reports_it_too(recipe, capsys, monkeypatch):
    from gatera_lightning.datamodules import CommonsenseDataModule

    def fail(self, **settings):
        raise RuntimeError("no room")

    monkeypatch.setattr(CommonsenseDataModule, "problems", fail)  # builds, but is asked later
    monkeypatch.setattr(CommonsenseDataModule, "__init__", fail)
    assert main(["preview", *recipe]) == 2
    assert "cannot be built: no room" in capsys.readouterr().err


def test_problem_of_a_class_of_this_package_says_what_is_accepted_once(problems, no_loading, working_folder):
    Path("sizes.yaml").write_text(
        "model: {objectives: [{class_path: gatera_lightning.objectives.SelfDraft, "
        "init_args: {block_sizes: [4], steps_per_size: 9}}]}"
    )
    (problem,) = problems("fit", "--config", "quickstart.yaml", "--config", "sizes.yaml")
    assert problem.startswith("model.objectives.0: gatera_lightning.objectives.SelfDraft cannot be built: ")
    assert problem.endswith("accepted: null with one size, or several block_sizes")
    assert problem.count("accepted") == 1
