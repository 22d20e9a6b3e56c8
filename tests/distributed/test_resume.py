"""Save, kill, resume: losses and example ids equal the uninterrupted run's, bit for bit."""

import json

import pytest
from fit_script import Job, run
from test_parity import fit

SETTINGS = {"epochs": 3, "accumulate": 2, "dropout": 0.2, "dtype": "float32"}
# Two steps an epoch: in mid-epoch, at an epoch's last batch, in epochs 1 and 2, and at on_train_epoch_end.
SAVE_POINTS = ["step_1", "step_2", "epoch_0", "step_3", "step_4", "epoch_1", "step_5"]
STEPS_DONE = {"step_1": 1, "step_2": 2, "epoch_0": 2, "step_3": 3, "step_4": 4, "epoch_1": 4, "step_5": 5}


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def uninterrupted(request, tiny_backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    job = Job(str(tiny_backbone), str(out), workers=request.param, save_at=[1, 2, 3, 4, 5], save_epoch_ends=True, **SETTINGS)
    return out, run(job), request.param


@pytest.mark.parametrize("save_point", SAVE_POINTS)
def test_resumed_run_is_bit_equal(uninterrupted, tiny_backbone, tmp_path, save_point):
    out, reference, workers = uninterrupted
    resumed = run(
        Job(str(tiny_backbone), str(tmp_path), workers=workers, resume=str(out / f"{save_point}.ckpt"), **SETTINGS)
    )
    done = STEPS_DONE[save_point]
    assert resumed.losses == reference.losses[done:]
    assert resumed.ids == reference.ids[2 * done :]
    assert len(reference.losses) == 6


def test_dropout_needs_the_saved_random_state(uninterrupted):
    """Otherwise the tests above would pass without it."""
    _, reference, _ = uninterrupted
    assert len(set(reference.losses)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_killed_in_mid_epoch_resume_bit_equal(tiny_backbone, tmp_path, strategy):
    settings = {**SETTINGS, "strategy": strategy, "workers": 2}
    fit(tiny_backbone, tmp_path / "whole", **settings)
    killed = fit(tiny_backbone, tmp_path / "killed", check=False, save_at=[3], kill_at=3, **settings)
    assert killed.returncode != 0
    fit(tiny_backbone, tmp_path / "resumed", resume=str(tmp_path / "killed" / "step_3.ckpt"), **settings)

    def losses(name):
        return json.loads((tmp_path / name / "losses.json").read_text())

    assert losses("killed") == losses("whole")[:3]
    assert losses("resumed") == losses("whole")[3:]
    for rank in (0, 1):
        ids = [json.loads((tmp_path / name / f"ids_{rank}.json").read_text()) for name in ("whole", "killed", "resumed")]
        assert ids[0] == ids[1] + ids[2]
