"""Checkpoints do not depend on the parallelism strategy: a run can resume with any other."""

import itertools
import json

import pytest
import torch
from fit_script import Job, run
from fits import fit
from safetensors.torch import load_file

from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO

# Four steps an epoch, saved in the middle of the second. On one process a step is two micro-batches, on two
# one each.
SETTINGS = {"epochs": 3, "clip": 1.0}
STRATEGIES = {
    "single": {"strategy": "single", "accumulate": 2},
    "single, no accumulation": {"strategy": "single", "accumulate": 1},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "sharded": {"strategy": "sharded"},
}
# Every strategy once on each side; other pairs run under `make stress`. test_resume.py covers equal
# strategies.
OFTEN = {
    ("single", "fsdp"),
    ("single, no accumulation", "ddp"),
    ("ddp", "single"),
    ("fsdp", "single, no accumulation"),
    ("sharded", "ddp"),
}
PAIRS = [
    pytest.param(name, resumed, marks=[] if (name, resumed) in OFTEN else pytest.mark.stress)
    for name, resumed in itertools.product(STRATEGIES, ["single", "single, no accumulation", "ddp", "fsdp"])
    if name != resumed
]


@pytest.fixture(scope="module")
def saved(tiny_backbone, tmp_path_factory):
    """The folders of an uninterrupted run with every strategy, each with a checkpoint of step 6."""
    root = tmp_path_factory.mktemp("saved")
    for name, settings in STRATEGIES.items():
        fit(tiny_backbone, root / name, save_at=[6], **SETTINGS, **settings)
    return root


def step_ids(out, settings):
    """The example ids of every step, over all ranks and micro-batches."""
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("ids_*.json"))]
    batches = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    parts = settings.get("accumulate", 1)
    return [sorted(itertools.chain(*batches[i : i + parts])) for i in range(0, len(batches), parts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_writes_the_same_checkpoint(saved, name):
    """Names, shapes and values; never a tensor of the backbone."""
    io = AtomicCheckpointIO()
    one, other = (
        io.load_checkpoint(saved / strategy / "step_6.ckpt", weights_only=True)
        for strategy in ("single", name)
    )
    assert (saved / name / "step_6.ckpt").is_dir() == (name == "sharded")
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, tensor in one["state_dict"].items():
        assert (tensor - other["state_dict"][key]).abs().max() < 1e-12
    (first,), (second,) = one["optimizer_states"], other["optimizer_states"]
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, moments in first["state"].items():
        for key, value in moments.items():
            assert torch.allclose(value, second["state"][index][key], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resumed"), PAIRS)
def test_run_resumes_with_another_strategy(saved, tiny_backbone, tmp_path, name, resumed):
    fit(tiny_backbone, tmp_path, resume=str(saved / name / "step_6.ckpt"), **SETTINGS, **STRATEGIES[resumed])
    losses, expected = (
        [float.fromhex(x) for x in json.loads((out / "losses.json").read_text())]
        for out in (tmp_path, saved / name)
    )
    assert losses == pytest.approx(expected[6:], rel=1e-12)
    assert step_ids(tmp_path, STRATEGIES[resumed]) == step_ids(saved / name, STRATEGIES[name])[6:]
    here, there = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (tmp_path, saved / name)
    )
    assert all((here[key] - there[key]).abs().max() < 1e-12 for key in there)


@pytest.mark.slow
def test_run_resumes_with_other_micro_batches(tiny_backbone, tmp_path):
    """On one process, which is fast."""
    uninterrupted = run(
        Job(
            str(tiny_backbone),
            str(tmp_path),
            accumulate=2,
            save_at=[3, 4, 6, 8],
            save_epoch_ends=True,
            **SETTINGS,
        )
    )
    for accumulate, step, name in (
        (1, 3, "step_3"),
        (4, 4, "step_4"),
        (1, 4, "epoch_0"),
        (4, 6, "step_6"),
        (1, 8, "step_8"),
    ):
        out = tmp_path / f"{name}-{accumulate}"
        out.mkdir()
        job = Job(
            str(tiny_backbone),
            str(out),
            accumulate=accumulate,
            resume=str(tmp_path / f"{name}.ckpt"),
            **SETTINGS,
        )
        losses, expected = ([float.fromhex(x) for x in watch.losses] for watch in (run(job), uninterrupted))
        assert losses == pytest.approx(expected[step:], rel=1e-12), name
