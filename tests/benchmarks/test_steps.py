"""The ways to run GateRA's step that benchmarks/train_step.py compares compute the same."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.harness import steps

    return steps


def test_module_and_plain_loop_take_same_steps(steps):
    settings = steps.StepSettings("float32", layers=1, width=192, rank=2, examples=2, tokens=12, supervised=3)
    losses, adapters = {}, {}
    for method in ("gatera", "gatera_saved", "plain_loop", "module"):
        contender = steps.build_contender(method, settings)
        losses[method] = [float(contender.loss().detach())]
        for _ in range(2):
            contender.step()
        losses[method].append(float(contender.loss().detach()))
        adapters[method] = torch.cat(
            [p.detach().flatten() for p in contender.model.parameters() if p.requires_grad]
        )
    for method in ("gatera_saved", "plain_loop", "module"):
        assert losses[method] == pytest.approx(losses["gatera"], rel=1e-6)
        torch.testing.assert_close(adapters[method], adapters["gatera"])
    assert losses["gatera"][1] != losses["gatera"][0]
