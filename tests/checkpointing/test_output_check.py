"""Whether results can be written is known before they are computed."""

import errno
import os
import resource
from pathlib import Path

import pytest

from gatera_lightning.checkpointing.output_check import file_problem, folder_problem


def test_writable_places_have_no_problem_and_stay_as_they_are(tmp_path):
    (tmp_path / "old.md").write_text("old")
    assert folder_problem(tmp_path) == folder_problem(tmp_path / "a" / "b") == ""
    assert file_problem(tmp_path / "old.md") == file_problem(tmp_path / "new.md") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["old.md"]
    assert (tmp_path / "old.md").read_text() == "old"


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert folder_problem(tmp_path / "file") == f"{tmp_path / 'file'} is not a folder"
    assert folder_problem(tmp_path / "file" / "below") == f"{tmp_path / 'file'} is not a folder"
    assert folder_problem(tmp_path / "loop" / "below").startswith(f"{tmp_path / 'loop'}: Too many levels")
    assert file_problem(tmp_path / "folder") == f"{tmp_path / 'folder'} is a folder"
    assert file_problem(tmp_path / "pipe") == f"{tmp_path / 'pipe'} is a pipe or a device"
    assert file_problem(tmp_path / "gone" / "a.md") == f"the folder {tmp_path / 'gone'} does not exist"


def test_folders_that_cannot_be_written_are_named():
    """Not even root can create files there."""
    assert folder_problem(Path("/proc/self/fdinfo")).startswith("/proc/self/fdinfo: ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_errors_of_the_file_system_are_named(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert folder_problem(tmp_path) == file_problem(tmp_path / "a") == f"{tmp_path}: {os.strerror(number)}"


def test_missing_room_is_named(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert folder_problem(tmp_path) == f"{tmp_path}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_limit_on_file_sizes_is_named(tmp_path):
    """A limit of the process, as clusters set it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    problems = []
    try:
        for limit in (1_000, 2**21):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            problems.append(folder_problem(tmp_path, room=2**24))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problems == [f"{tmp_path}: File too large", ""]  # several files of 2 MiB fit


def test_file_system_without_reservation_passes(tmp_path, monkeypatch):
    def unsupported(descriptor, offset, length):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert folder_problem(tmp_path) == ""
