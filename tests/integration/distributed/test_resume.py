"""A resumed run has the losses and example ids of the uninterrupted run, bit for bit."""

import pytest
from fit_script import Job, run
from fits import fit, read_ids, read_losses, save_tuned_adapter

from gatera_lightning.callbacks.rng_state import RNGState

SETTINGS = {"epochs": 3, "accumulate": 2, "dropout": 0.2, "dtype": "float32"}
# Four steps per epoch: in mid-epoch, at the last batch and at on_train_epoch_end, in each epoch. The values
# are numbers of optimizer steps.
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


@pytest.mark.slow
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
    taken = SAVE_POINTS[save_point]
    assert resumed.losses == reference.losses[taken:]
    assert resumed.ids == reference.ids[2 * taken :]
    assert len(reference.losses) == 12


def test_resumed_run_differs_without_saved_random_state(uninterrupted, tiny_backbone, tmp_path, monkeypatch):
    """Shows that the test above depends on the random state."""
    monkeypatch.setattr(RNGState, "load_state_dict", lambda self, state: None)
    out, reference, workers = uninterrupted
    resumed = run(
        Job(str(tiny_backbone), str(tmp_path), workers=workers, resume=str(out / "step_6.ckpt"), **SETTINGS)
    )
    assert resumed.ids == reference.ids[12:]
    assert resumed.losses != reference.losses[6:]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "drafts_for_tuned"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_two_ranks_killed_in_mid_epoch_resume_bit_equal(tiny_backbone, tmp_path, strategy, drafts_for_tuned):
    settings = {**SETTINGS, "strategy": strategy, "workers": 2}
    if drafts_for_tuned:
        tuned = save_tuned_adapter(tiny_backbone, tmp_path / "tuned")
        settings |= {"update": "lora", "gate": "position", "adapter": {"alpha": 8.0}, "tuned": tuned}
    fit(tiny_backbone, tmp_path / "uninterrupted", **settings)
    killed = fit(tiny_backbone, tmp_path / "killed", check=False, save_at=[6], kill_at=6, **settings)
    assert killed.returncode != 0
    fit(tiny_backbone, tmp_path / "resumed", resume=str(tmp_path / "killed" / "step_6.ckpt"), **settings)
    folders = [tmp_path / name for name in ("uninterrupted", "killed", "resumed")]
    losses = [read_losses(out) for out in folders]
    assert losses[0] == losses[1] + losses[2]
    assert len(losses[1]) == 6
    for rank in (0, 1):
        ids = [read_ids(out, rank) for out in folders]
        assert ids[0] == ids[1] + ids[2]
