"""A checkpoint is one of the run, not of its processes: any number of them, sharded or not, goes on from it."""

import itertools
import json

import pytest
import torch
from fit_script import Job, run
from fits import fit
from safetensors.torch import load_file

from gatera_lightning.checkpointing.checkpoint_io import WholeCheckpointIO

# Four steps an epoch, saved in the middle of the second. On one process a step is two micro-batches, on two one each.
SETTINGS = {"epochs": 3, "clip": 1.0}
WAYS = {
    "single": {"strategy": "single", "accumulate": 2},
    "single, whole steps": {"strategy": "single", "accumulate": 1},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "sharded": {"strategy": "sharded"},
}
# Every way as the first and as the second; other pairs under `make stress`. A way after itself: test_resume.py, bit for bit.
OFTEN = {
    ("single", "fsdp"),
    ("single, whole steps", "ddp"),
    ("ddp", "single"),
    ("fsdp", "single, whole steps"),
    ("sharded", "ddp"),
}
PAIRS = [
    pytest.param(name, resumed, marks=[] if (name, resumed) in OFTEN else pytest.mark.stress)
    for name, resumed in itertools.product(WAYS, ["single", "single, whole steps", "ddp", "fsdp"])
    if name != resumed
]


@pytest.fixture(scope="module")
def saved(tiny_backbone, tmp_path_factory):
    """The folder of an uninterrupted run of every way, each with its checkpoint after step 6."""
    root = tmp_path_factory.mktemp("saved")
    for name, way in WAYS.items():
        fit(tiny_backbone, root / name, save_at=[6], **SETTINGS, **way)
    return root


def step_ids(out, way):
    """The example ids of every step, over all processes and micro-batches."""
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("ids_*.json"))]
    batches = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    parts = way.get("accumulate", 1)
    return [sorted(itertools.chain(*batches[i : i + parts])) for i in range(0, len(batches), parts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_way_writes_the_same_checkpoint(saved, name):
    """Names, shapes and values; and never a tensor of the backbone."""
    io = WholeCheckpointIO()
    one, other = (
        io.load_checkpoint(saved / way / "step_6.ckpt", weights_only=True) for way in ("single", name)
    )
    assert (saved / name / "step_6.ckpt").is_dir() == (name == "sharded")
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, tensor in one["state_dict"].items():
        assert (tensor - other["state_dict"][key]).abs().max() < 1e-12
    (first,), (second,) = one["optimizer_states"], other["optimizer_states"]
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, moments in first["state"].items():
        for key, value in moments.items():
            assert torch.allclose(value, second["state"][number][key], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resumed"), PAIRS)
def test_a_run_goes_on_in_any_way(saved, tiny_backbone, tmp_path, name, resumed):
    fit(tiny_backbone, tmp_path, resume=str(saved / name / "step_6.ckpt"), **SETTINGS, **WAYS[resumed])
    losses, expected = (
        [float.fromhex(x) for x in json.loads((out / "losses.json").read_text())]
        for out in (tmp_path, saved / name)
    )
    assert losses == pytest.approx(expected[6:], rel=1e-12)
    assert step_ids(tmp_path, WAYS[resumed]) == step_ids(saved / name, WAYS[name])[6:]
    here, there = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (tmp_path, saved / name)
    )
    assert all((here[key] - there[key]).abs().max() < 1e-12 for key in there)


def test_another_cut_of_the_steps_on_one_process(tiny_backbone, tmp_path):
    """The fast part of the above."""
    whole = run(
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
        losses, expected = ([float.fromhex(x) for x in watch.losses] for watch in (run(job), whole))
        assert losses == pytest.approx(expected[step:], rel=1e-12), name
