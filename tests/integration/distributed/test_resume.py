"""Save, kill, resume: losses and example ids equal the uninterrupted run's, bit for bit."""

import json

import pytest
from fit_script import Job, run
from fits import fit

from gatera_lightning.callbacks.rng_state import RNGState

SETTINGS = {"epochs": 3, "accumulate": 2, "dropout": 0.2, "dtype": "float32"}
# Four steps an epoch: in mid-epoch, at an epoch's last batch, and at on_train_epoch_end, in each epoch. The value is the
# number of optimizer steps done.
SAVE_POINTS = {
    "step_1": 1,
    "step_4": 4,
    "epoch_0": 4,
    "step_6": 6,
    "step_8": 8,
    "epoch_1": 8,
    "step_9": 9,
    "step_11": 11,
}


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def uninterrupted(request, tiny_backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    job = Job(
        str(tiny_backbone),
        str(out),
        workers=request.param,
        save_at=[1, 4, 6, 8, 9, 11],
        save_epoch_ends=True,
        **SETTINGS,
    )
    return out, run(job), request.param


@pytest.mark.parametrize("save_point", SAVE_POINTS)
def test_resumed_run_is_bit_equal(uninterrupted, tiny_backbone, tmp_path, save_point):
    out, reference, workers = uninterrupted
    resumed = run(
        Job(
            str(tiny_backbone),
            str(tmp_path),
            workers=workers,
            resume=str(out / f"{save_point}.ckpt"),
            **SETTINGS,
        )
    )
    done = SAVE_POINTS[save_point]
    assert resumed.losses == reference.losses[done:]
    assert resumed.ids == reference.ids[2 * done :]
    assert len(reference.losses) == 12


def test_without_the_saved_random_state_the_run_differs(uninterrupted, tiny_backbone, tmp_path, monkeypatch):
    """Otherwise the test above would pass without it."""
    monkeypatch.setattr(RNGState, "load_state_dict", lambda self, state: None)
    out, reference, workers = uninterrupted
    resumed = run(
        Job(str(tiny_backbone), str(tmp_path), workers=workers, resume=str(out / "step_6.ckpt"), **SETTINGS)
    )
    assert resumed.ids == reference.ids[12:]
    assert resumed.losses != reference.losses[6:]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_killed_in_mid_epoch_resume_bit_equal(tiny_backbone, tmp_path, strategy):
    settings = {**SETTINGS, "strategy": strategy, "workers": 2}
    fit(tiny_backbone, tmp_path / "whole", **settings)
    killed = fit(tiny_backbone, tmp_path / "killed", check=False, save_at=[6], kill_at=6, **settings)
    assert killed.returncode != 0
    fit(tiny_backbone, tmp_path / "resumed", resume=str(tmp_path / "killed" / "step_6.ckpt"), **settings)

    def losses(name):
        return json.loads((tmp_path / name / "losses.json").read_text())

    assert losses("killed") == losses("whole")[:6]
    assert losses("resumed") == losses("whole")[6:]
    for rank in (0, 1):
        ids = [
            json.loads((tmp_path / name / f"ids_{rank}.json").read_text())
            for name in ("whole", "killed", "resumed")
        ]
        assert ids[0] == ids[1] + ids[2]
