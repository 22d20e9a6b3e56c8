"""Checkpoints are loaded only if they are intact, and a full disk costs no earlier checkpoint."""

import contextlib
import os
import resource
import shutil
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
from sample_checkpoints import CHECKPOINT, flip_bit_of_tensor, is_checkpoint
from tiny_backbone import tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.integrity import newest_valid_checkpoint
from gatera_lightning.cli.main import main
from gatera_lightning.errors import CheckpointError


def test_load_checkpoint_reads_files_and_sharded_checkpoints(checkpoint_file, sharded_checkpoint):
    assert is_checkpoint(AtomicCheckpointIO().load_checkpoint(checkpoint_file))
    assert is_checkpoint(AtomicCheckpointIO().load_checkpoint(sharded_checkpoint))


def test_load_checkpoint_names_the_corrupt_file(checkpoint_file, sharded_copy, tmp_path):
    path = Path(shutil.copy(checkpoint_file, tmp_path / "flipped.ckpt"))
    flip_bit_of_tensor(path)
    with pytest.raises(
        CheckpointError,
        match=r"flipped\.ckpt: the file is corrupt \(record last/data/0 does not match its checksum\)",
    ):
        AtomicCheckpointIO().load_checkpoint(path)
    (sharded_copy / "rest.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt: the checkpoint is corrupt \(rest\.pt is missing\)"
    ):
        AtomicCheckpointIO().load_checkpoint(sharded_copy)


# --- a full disk ---


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """Mount a disk of this size at ``folder``; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("only root can mount a disk to fill")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a disk to fill: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def file_size_limit(size):
    """Limit the size of this process's files, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_failure_keeps_previous(root, too_large, reason):
    io, path = AtomicCheckpointIO(), root / "last.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    assert io.failure is None
    before = path.read_bytes()
    with too_large() as tensor:
        io.save_checkpoint(CHECKPOINT | {"more": tensor}, path)
    assert io.failure.startswith(f"cannot write the checkpoint {path} (")
    assert io.failure.endswith("); the previous checkpoint is unchanged")
    assert reason in io.failure
    assert path.read_bytes() == before
    assert [found.name for found in root.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"global_step": 8}, path)
    assert io.failure is None
    assert torch.load(path, weights_only=True) == {"global_step": 8}


def test_save_checkpoint_to_full_disk_keeps_previous(tmp_path):
    with small_disk(tmp_path / "disk", 64) as root:
        assert_failure_keeps_previous(
            root, lambda: contextlib.nullcontext(torch.ones(20_000)), "No space left on device"
        )


def test_save_checkpoint_above_size_limit_keeps_previous(tmp_path):
    @contextlib.contextmanager
    def too_large():
        with file_size_limit(20_000):
            yield torch.ones(20_000)

    assert_failure_keeps_previous(tmp_path, too_large, "File too large")


class Quota(L.Callback):
    """From the third step on, no file can be as large as a checkpoint."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            self.before = (Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt").read_bytes()
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (len(self.before) // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )


def test_fit_ends_when_a_checkpoint_cannot_be_written(tiny_backbone, tmp_path):
    quota = Quota()
    trainer = tiny_trainer(tmp_path, quota, AdapterCheckpoint(monitor=None, every_n_steps=1))
    message = r"cannot write the checkpoint .*/checkpoints/last\.ckpt \(.*File too large"
    with file_size_limit(10_000_000), pytest.raises(CheckpointError, match=message):
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    assert trainer.global_step == 3
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.read_bytes() == quota.before
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert newest_valid_checkpoint(last.parent) == last
    assert not list(last.parent.glob("*.tmp*"))


def test_full_disk_ends_a_run_with_one_line(tiny_backbone, tmp_path, monkeypatch, capsys):
    """The disk has room for one checkpoint and half of the next."""
    monkeypatch.chdir(tmp_path)
    args = [
        *("fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone)),
        *("--checkpoint.every_n_steps", "1", "--trainer.val_check_interval", "1.0"),
    ]
    assert main([*args, "--trainer.logger.init_args.version", "roomy", "--trainer.max_steps", "1"]) == 0
    written = sum(
        path.stat().st_size for path in Path("runs/quickstart/roomy/checkpoints").rglob("*") if path.is_file()
    )
    size = Path("runs/quickstart/roomy/checkpoints/last.ckpt").stat().st_size
    capsys.readouterr()
    kilobytes = (written + size // 2) // 1024
    # The room that a run asks for before it starts is more than these small checkpoints need.
    monkeypatch.setattr("gatera_lightning.callbacks.adapter_checkpoint.folder_problem", lambda _: "")
    with small_disk(tmp_path / "runs/quickstart/full/checkpoints", kilobytes) as folder:
        assert main([*args, "--trainer.logger.init_args.version", "full"]) == 1
        error = capsys.readouterr().err
        assert "python -m gatera_lightning: cannot write the checkpoint" in error
        assert str(Path("full/checkpoints/last.ckpt")) in error
        assert "No space left on device" in error
        assert "Traceback" not in error
        assert newest_valid_checkpoint(folder) == folder / "last.ckpt"
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1
        assert not list(folder.glob("*.tmp*"))
