"""Runs with gates that decide and with the updates of even rank: resume, recomputation and what is logged."""

import pytest
import torch
from fit_script import Job, run
from safetensors.torch import load_file

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    DecodingConfig,
    HardGateConfig,
    OptimizerConfig,
    TokenGateConfig,
)
from gatera_lightning.objectives.training_loss import objectives_for
from gatera_lightning.training.setting_checks import module_problems

METHODS = [
    ("hira", "hard"),
    ("block_hira", "hard"),
    ("lora", "hard"),
    ("lora", "threshold"),
    ("dora", "threshold"),
    ("abba", "token"),
]


@pytest.fixture
def trained(tiny_backbone, tmp_path):
    """Return a function that trains in float64 and returns the losses and the adapter's tensors."""

    def train(folder, **job):
        (tmp_path / folder).mkdir()
        found = run(Job(str(tiny_backbone), str(tmp_path / folder), **job))
        return found.losses, load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")

    return train


@pytest.mark.parametrize(("update", "gate"), METHODS, ids=["-".join(method) for method in METHODS])
def test_resumed_run_repeats_the_draws(trained, tmp_path, update, gate):
    losses, adapter = trained("whole", update=update, gate=gate, save_at=[2])
    resumed, again = trained("rest", update=update, gate=gate, resume=f"{tmp_path}/whole/step_2.ckpt")
    assert losses[-len(resumed) :] == resumed
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
    other, _ = trained("other", update=update, gate="none" if gate != "none" else "token")
    assert other != losses


@pytest.mark.parametrize(("update", "gate"), [("hira", "hard"), ("lora", "threshold")])
def test_recomputed_layers_repeat_the_draws(trained, update, gate):
    losses, adapter = trained("plain", update=update, gate=gate)
    recomputed, again = trained("recomputed", update=update, gate=gate, checkpointing=True)
    assert losses == recomputed
    for name in adapter:
        torch.testing.assert_close(adapter[name], again[name], rtol=0, atol=1e-12)


def test_rounding_is_repeated_on_resume_and_recomputation(trained, tmp_path):
    job = {"gate": "none", "dtype": "bfloat16", "adapter": {"stochastic_rounding": True}}
    losses, adapter = trained("whole", save_at=[2], **job)
    resumed, again = trained("rest", resume=f"{tmp_path}/whole/step_2.ckpt", **job)
    assert losses[-len(resumed) :] == resumed
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
    recomputed, _ = trained("recomputed", checkpointing=True, **job)
    assert losses == recomputed
    exact, _ = trained("exact", **job | {"adapter": {}})
    assert exact != losses


def test_compile_is_refused_with_hard_gates(tiny_backbone):
    def problems(gate):
        backbone = BackboneConfig(str(tiny_backbone), compile=True)
        adapter = AdapterConfig(gate=gate)
        objectives = objectives_for(adapter)
        return module_problems(backbone, adapter, OptimizerConfig(), DecodingConfig(), None, objectives)

    assert problems(TokenGateConfig()) == problems(HardGateConfig(reads="outputs")) == []
    (problem,) = problems(HardGateConfig())
    assert problem.startswith("model.backbone.compile: true, with a 'hard' gate: closed and open tokens")
