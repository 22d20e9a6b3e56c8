"""Sample checkpoints: one file and one sharded folder for all tests, and copies that a test may corrupt."""

import shutil
from pathlib import Path

import pytest
import torch
from sample_checkpoints import CHECKPOINT, write_sharded_checkpoint


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "last.ckpt"
    torch.save(CHECKPOINT, path)
    return path


@pytest.fixture(scope="session")
def sharded_checkpoint(tmp_path_factory):
    return write_sharded_checkpoint(CHECKPOINT, tmp_path_factory.mktemp("folder") / "last.ckpt")


@pytest.fixture
def sharded_copy(sharded_checkpoint, tmp_path):
    return Path(shutil.copytree(sharded_checkpoint, tmp_path / "last.ckpt"))
