"""Corruption of any kind is found, and the newest valid checkpoint is chosen."""

import json
import shutil
import zipfile

import pytest
import torch
from sample_checkpoints import (
    flip_bit_of_tensor,
    is_checkpoint,
    make_empty,
    save_step,
    tensor_positions,
    truncate,
    with_flipped_bit,
)

from gatera_lightning.checkpointing.integrity import find_corruption, newest_valid_checkpoint
from gatera_lightning.checkpointing.sharded_format import read_sharded
from gatera_lightning.errors import CheckpointError


def directory_entries(path):
    """Where each entry of the directory at the end of a zip file begins."""
    content, found = path.read_bytes(), []
    while (position := content.find(b"PK\x01\x02", found[-1] + 1 if found else 0)) >= 0:
        found.append(position)
    return found


# --- find_corruption ---


def test_find_corruption_accepts_valid_checkpoints(checkpoint_file, sharded_checkpoint):
    assert find_corruption(checkpoint_file) is None
    assert find_corruption(sharded_checkpoint) is None


def test_find_corruption_reports_missing_file(tmp_path):
    assert find_corruption(tmp_path / "last.ckpt") == "there is no such file"


def test_find_corruption_reports_truncated_file(checkpoint_file, tmp_path):
    content = checkpoint_file.read_bytes()
    path = tmp_path / "short.ckpt"
    size = len(content)
    for length in (0, 1, 2, size // 2, size - 100, size - 22, size - 2, size - 1, *range(3, size, 97)):
        path.write_bytes(content[:length])
        assert find_corruption(path), length
    path.write_bytes(b"")
    assert find_corruption(path) == "the file is empty"


def test_find_corruption_reports_every_flipped_bit_that_matters(checkpoint_file, tmp_path):
    """Every byte of the directory at the end, every seventh of the rest; only padding may go unnoticed."""
    content, of_tensors = checkpoint_file.read_bytes(), tensor_positions(checkpoint_file)
    assert len(of_tensors) == 4 * 1088
    directory = directory_entries(checkpoint_file)[0]
    path, unnoticed = tmp_path / "flipped.ckpt", 0
    for position in (*range(0, directory, 7), *range(directory, len(content))):
        path.write_bytes(with_flipped_bit(content, position, position % 8))
        if not find_corruption(path):
            assert position not in of_tensors
            assert is_checkpoint(torch.load(path, weights_only=True)), position
            unnoticed += 1
    assert 0 < unnoticed < len(content) // 10


@pytest.mark.parametrize("number", range(8))
def test_find_corruption_reports_record_marked_as_folder(checkpoint_file, tmp_path, number):
    """With this bit PyTorch does not read the record, and returns whatever the memory holds."""
    entries = directory_entries(checkpoint_file)
    assert len(entries) == 8
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(with_flipped_bit(checkpoint_file.read_bytes(), entries[number] + 38, 4))
    with zipfile.ZipFile(path) as archive:
        name = archive.namelist()[number]
    assert find_corruption(path) == f"the file is corrupt (record {name} does not match its checksum)"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt", "files.json"])
def test_find_corruption_reports_corrupt_file_of_sharded_checkpoint(sharded_copy, name):
    content = (sharded_copy / name).read_bytes()
    size = len(content)
    for length in (0, 1, size // 2, size - 2):
        (sharded_copy / name).write_bytes(content[:length])
        assert f"({name}" in find_corruption(sharded_copy), length
    for position in range(0, size, max(1, size // 200)):
        (sharded_copy / name).write_bytes(with_flipped_bit(content, position, position % 8))
        found = find_corruption(sharded_copy)
        if name != "files.json":
            assert found == f"the checkpoint is corrupt ({name} does not match its checksum)"
        assert found or is_checkpoint(read_sharded(sharded_copy, weights_only=True)), position
    (sharded_copy / name).unlink()
    assert f"({name}" in find_corruption(sharded_copy)
    (sharded_copy / name).write_bytes(content)
    assert find_corruption(sharded_copy) is None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt"])
def test_find_corruption_reports_file_without_checksum(sharded_copy, name):
    digests = json.loads((sharded_copy / "files.json").read_text())
    del digests[name]
    (sharded_copy / "files.json").write_text(json.dumps(digests))
    assert find_corruption(sharded_copy) == f"the checkpoint is corrupt (files.json does not list {name})"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rest.pt": 3}', "\udcff"])
def test_find_corruption_reports_malformed_checksums(sharded_copy, text):
    (sharded_copy / "files.json").write_text(text, errors="surrogateescape")
    assert "files.json" in find_corruption(sharded_copy)


# --- newest_valid_checkpoint ---


def test_newest_valid_checkpoint_has_the_most_steps(tmp_path):
    save_step(tmp_path / "last-1.ckpt", 8)
    save_step(tmp_path / "last.ckpt", 4)
    furthest = save_step(tmp_path / "best-step=10.ckpt", 10)
    assert newest_valid_checkpoint(tmp_path) == furthest


@pytest.mark.parametrize("other", ["best-step=6.ckpt", "z.ckpt"])
def test_newest_valid_checkpoint_prefers_last_at_the_same_step(tmp_path, other):
    save_step(tmp_path / other, 6)
    save_step(tmp_path / "last.ckpt", 6)
    assert newest_valid_checkpoint(tmp_path) == tmp_path / "last.ckpt"


def test_newest_valid_checkpoint_compares_files_with_sharded_checkpoints(sharded_checkpoint, tmp_path):
    save_step(tmp_path / "last-1.ckpt", 6)
    shutil.copytree(sharded_checkpoint, tmp_path / "last.ckpt")  # of step 7
    assert newest_valid_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    save_step(tmp_path / "best-step=9.ckpt", 9)
    assert newest_valid_checkpoint(tmp_path) == tmp_path / "best-step=9.ckpt"


@pytest.mark.parametrize(
    ("corrupt", "problem"),
    [
        (truncate, "the file is corrupt (File is not a zip file)"),
        (flip_bit_of_tensor, "the file is corrupt (record last/data/0 does not match its checksum)"),
        (make_empty, "the file is empty"),
        (
            lambda path: torch.save([1, 2], path),
            "it cannot be read (list indices must be integers or slices, not str)",
        ),
        (lambda path: path.write_text("no checkpoint"), "the file is corrupt (File is not a zip file)"),
    ],
    ids=["truncated", "flipped", "empty", "foreign", "text"],
)
def test_newest_valid_checkpoint_skips_corrupt_file_with_warning(tmp_path, caplog, corrupt, problem):
    save_step(tmp_path / "best-step=2.ckpt", 2)
    previous = save_step(tmp_path / "last-1.ckpt", 4)
    corrupt(save_step(tmp_path / "last.ckpt", 6))
    with caplog.at_level("INFO"):
        assert newest_valid_checkpoint(tmp_path) == previous
    assert [record.getMessage() for record in caplog.records] == [
        f"skipping the checkpoint {tmp_path / 'last.ckpt'}: {problem}",
        f"newest valid checkpoint: {previous}, at optimizer step 4",
    ]


def test_newest_valid_checkpoint_skips_corrupt_sharded_checkpoint(sharded_copy, caplog):
    previous = save_step(sharded_copy.parent / "last-1.ckpt", 6)
    (sharded_copy / "__0_0.distcp").unlink()
    assert newest_valid_checkpoint(sharded_copy.parent) == previous
    problem = "the checkpoint is corrupt (__0_0.distcp is missing)"
    assert f"skipping the checkpoint {sharded_copy}: {problem}" in caplog.text


def test_newest_valid_checkpoint_raises_if_all_are_corrupt(tmp_path):
    make_empty(tmp_path / "last.ckpt")
    truncate(save_step(tmp_path / "last-1.ckpt", 4))
    with pytest.raises(CheckpointError, match=r": every checkpoint is corrupt: last-1\.ckpt, last\.ckpt$"):
        newest_valid_checkpoint(tmp_path)


def test_newest_valid_checkpoint_ignores_temporary_files(tmp_path):
    assert newest_valid_checkpoint(tmp_path) is None
    for name in ("last.ckpt.tmp", "last.ckpt.tmp-old", "last.ckpt.draft", "last", "notes.txt"):
        save_step(tmp_path / name, 100)
    (tmp_path / "last-1.ckpt.tmp").mkdir()
    assert newest_valid_checkpoint(tmp_path) is None
    assert newest_valid_checkpoint(tmp_path / "nowhere") is None
    last = save_step(tmp_path / "last.ckpt", 3)
    assert newest_valid_checkpoint(tmp_path) == last
