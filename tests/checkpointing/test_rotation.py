"""Previous checkpoints are kept under numbers, and a process killed at any moment leaves the newest one."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from gatera_lightning.checkpointing.atomic_files import make_empty_folder, replace, temporary_path
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.integrity import find_corruption, newest_valid_checkpoint
from gatera_lightning.checkpointing.rotation import hold_current, rotate
from gatera_lightning.checkpointing.sharded_format import write_sharded


def write(root, step, keep, sharded):
    """Write a checkpoint as AdapterCheckpoint does; a sharded one has no shards."""
    path = root / "last.ckpt"
    held = hold_current(path)
    if not sharded:
        io = AtomicCheckpointIO()
        io.save_checkpoint({"global_step": step}, path)
        assert io.failure is None
    else:
        temporary = temporary_path(path)
        make_empty_folder(temporary)
        write_sharded({"global_step": step}, temporary, rank=0)
        replace(temporary, path)
    if held is not None:
        rotate(held, path, keep)


def global_step(path):
    return torch.load(path / "rest.pt" if path.is_dir() else path, weights_only=True)["global_step"]


def steps(root):
    """The optimizer step of every checkpoint in a folder, all of which must be valid."""
    paths = [path for path in root.iterdir() if ".tmp" not in path.name]
    assert [find_corruption(path) for path in paths] == [None] * len(paths)
    return {path.name: global_step(path) for path in paths}


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
def test_rotate_keeps_the_newest_under_numbers(tmp_path, sharded):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, 3, sharded)
    assert steps(tmp_path) == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}


@pytest.mark.parametrize(
    "order", [(False, True), (True, False)], ids=["file, then sharded", "sharded, then file"]
)
def test_rotate_replaces_one_kind_by_the_other(tmp_path, order):
    for step, sharded in enumerate((order[0], order[0], order[1], order[1], order[1])):
        write(tmp_path, step, 2, sharded)
        assert steps(tmp_path) == ({"last.ckpt": step, "last-1.ckpt": step - 1} if step else {"last.ckpt": 0})
        assert (tmp_path / "last.ckpt").is_dir() == sharded


@pytest.mark.parametrize(("sharded", "keep"), [(False, 1), (False, 2), (False, 3), (True, 2), (True, 3)])
def test_process_killed_at_any_rename_leaves_a_valid_checkpoint(tmp_path, monkeypatch, sharded, keep):
    root = tmp_path / "run"
    root.mkdir()
    for step in (1, 2, 3):
        write(root, step, keep, sharded)
    snapshots = []  # what a kill before each change of a name would leave

    def watch(function):
        def watched(*args, **kwargs):
            snapshots.append(shutil.copytree(root, tmp_path / f"snapshot-{len(snapshots)}"))
            return function(*args, **kwargs)

        return watched

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "unlink", "rmdir"):
            patch.setattr(os, name, watch(getattr(os, name)))
        write(root, 4, keep, sharded)
    assert len(snapshots) >= (1 if keep == 1 else 2 * keep - 1)
    for snapshot in snapshots:
        assert global_step(newest_valid_checkpoint(snapshot)) in (3, 4)
        write(snapshot, 5, keep, sharded)  # what was left does not hinder a run that resumes
        assert newest_valid_checkpoint(snapshot) == snapshot / "last.ckpt"
        assert steps(snapshot)["last.ckpt"] == 5


def test_hold_current_survives_kill_between_two_renames(tmp_path, monkeypatch):
    """Folders cannot be exchanged in one step: in between, the old one has only its second name."""
    for step in (1, 2):
        write(tmp_path, step, 1, sharded=True)
    rename = os.replace

    def killed(temporary, path):
        if Path(temporary).name == "last.ckpt.tmp":
            raise KeyboardInterrupt
        rename(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3, 1, sharded=True)
    assert steps(tmp_path) == {"last-held.ckpt": 2}
    assert newest_valid_checkpoint(tmp_path) == tmp_path / "last-held.ckpt"


def test_hold_current_copies_files_without_hard_links(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    for step in (1, 2):
        write(tmp_path, step, 2, sharded=False)
    assert steps(tmp_path) == {"last.ckpt": 2, "last-1.ckpt": 1}
