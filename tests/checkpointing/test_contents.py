"""What a checkpoint says about its run is read without unpickling foreign classes."""

import builtins
from pathlib import Path

import pytest
import torch

from gatera_lightning.checkpointing.contents import check_entries, read_contents
from gatera_lightning.checkpointing.integrity import find_corruption
from gatera_lightning.errors import CheckpointError

ADAPTER = {
    "state_dict": {},
    "adapter": {},
    "backbone": {"id": "a", "revision": None, "fingerprint": "b"},
}
RESUMES = {"global_step": 3, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}


def test_file_and_sharded_checkpoint_are_read(checkpoint_file, sharded_checkpoint):
    assert read_contents(checkpoint_file)["global_step"] == 7
    assert read_contents(sharded_checkpoint)["global_step"] == 7


def test_sharded_checkpoint_with_a_missing_part_is_rejected(sharded_copy):
    next(sharded_copy.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: the checkpoint is corrupt \(.* is missing\)"):
        read_contents(sharded_copy)


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
def test_unreadable_checkpoint_is_rejected(checkpoint_file, sharded_checkpoint, monkeypatch, sharded):
    """A root user may read everything, so the refusal of the system is simulated."""
    real = builtins.open

    def refuse(path, *args, **options):
        if isinstance(path, str | Path) and Path(path).suffix in (".ckpt", ".distcp", ".pt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", refuse)
    problem = find_corruption(sharded_checkpoint if sharded else checkpoint_file)
    assert problem.startswith("it cannot be read (")
    assert problem.endswith("Permission denied)")


@pytest.mark.parametrize("name", ADAPTER)
@pytest.mark.parametrize("value", [None, "text", 2.5])
def test_entries_of_another_type_are_rejected(name, value):
    check_entries(ADAPTER, "last.ckpt")
    with pytest.raises(CheckpointError, match=rf"last\.ckpt: .* it lacks {name}$"):
        check_entries(ADAPTER | {name: value}, "last.ckpt")


@pytest.mark.parametrize("name", RESUMES)
def test_resuming_needs_every_state(name):
    contents = ADAPTER | RESUMES
    check_entries(contents, "last.ckpt", resumes=True)
    del contents[name]
    check_entries(contents, "last.ckpt")
    with pytest.raises(CheckpointError, match=f"cannot resume a run; it lacks {name}"):
        check_entries(contents, "last.ckpt", resumes=True)


def test_backbone_entry_must_be_complete():
    with pytest.raises(CheckpointError, match=r"its entry backbone lacks revision, fingerprint$"):
        check_entries(ADAPTER | {"backbone": {"id": "a"}}, "last.ckpt")


@pytest.mark.parametrize("content", [[1], torch.ones(2), "text", None])
def test_file_that_holds_no_entries_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_contents(tmp_path / "other.ckpt")
