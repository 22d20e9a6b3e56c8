"""A disk that fills up during a run ends all ranks with the reason, and earlier checkpoints stay valid."""

import os
import subprocess

import pytest
from killed_runs import start, steps, wait_until

from gatera_lightning.checkpointing.integrity import newest_valid_checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A run's folder with its checkpoints on a disk of 4 MB."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_full_disk_ends_all_ranks_and_keeps_previous_checkpoints(tiny_backbone, small_disk, strategy):
    process = start(tiny_backbone, small_disk, strategy=strategy, step_seconds=0.3)
    assert wait_until(lambda: len(steps(small_disk)) >= 3, process)
    disk = os.statvfs(small_disk / "checkpoints")
    with (small_disk / "checkpoints" / "filler").open("wb") as file:
        file.write(bytes(disk.f_bavail * disk.f_bsize - 3 * 4096))
    assert process.wait(timeout=120) != 0
    output = (small_disk / "output.txt").read_text()
    assert "CheckpointError" in output
    assert "No space left on device" in output
    assert newest_valid_checkpoint(small_disk / "checkpoints") is not None
    assert not list((small_disk / "checkpoints").glob("last.ckpt.tmp*"))
