"""``demo``: a model before and after fine-tuning."""

import re
from pathlib import Path

import pytest
from tiny_backbone import tiny_args

from gatera_lightning.cli.main import main


@pytest.fixture
def flags(tiny_backbone):
    return tiny_args(tiny_backbone)


@pytest.mark.slow
def test_demo_compares_before_and_after(flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    steps = ["--trainer.max_steps", "12", "--trainer.max_epochs", "4", "--model.optimizer.warmup_steps", "0"]
    assert main(["demo", *flags, *steps]) == 0
    out = capsys.readouterr().out
    table = out[out.index("GateRA in a few minutes") :]
    assert "before" in table
    losses = re.search(r"cross-entropy loss \(nats per token\)\s*│\s*([\d.]+)\s*│\s*([\d.]+)", table)
    before, after = map(float, losses.groups())
    assert after < before
    assert re.search(r"accuracy, per-token likelihood\s*│\s*[\d.]+ \[[\d.]+, [\d.]+\]\s*│", table)
    adapter = Path(re.search(r"adapter: +(\S+)", table)[1])
    assert (adapter / "adapter_model.safetensors").is_file()
    folder = Path(re.search(r"tensorboard --logdir (\S+)", table)[1])
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_demo_works_without_a_best_checkpoint(flags, capsys):
    """One step ends before the first validation."""
    assert main(["demo", *flags, "--trainer.max_steps", "1"]) == 0
    assert "GateRA in a few minutes" in capsys.readouterr().out


def test_demo_reports_problems(flags, problems):
    (problem,) = problems("demo", *flags, "--model.adapter.rank", "0")
    assert problem.startswith("model.adapter.rank: 0 is not a rank")
