"""Files and folders appear complete under their names, or not at all."""

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

from gatera_lightning.checkpointing.atomic_files import (
    atomic_file,
    make_empty_folder,
    remove,
    replace,
    temporary_path,
    write_text,
)


def test_atomic_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary == temporary_path(path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_keeps_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway():
        with atomic_file(path) as temporary:
            temporary.write_text("ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_files_in_one_statement_appear_only_once_both_are_written(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"

    def fail_between():
        with atomic_file(one) as first, atomic_file(other):
            first.write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_between()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leftover", ["file", "folder"])
def test_atomic_file_replaces_what_a_killed_process_left(tmp_path, leftover):
    temporary = temporary_path(tmp_path / "file")
    if leftover == "folder":
        make_empty_folder(temporary)
        (temporary / "part").write_text("half")
    else:
        temporary.write_text("half of a long text")
    write_text(tmp_path / "file", "ä")
    assert (tmp_path / "file").read_bytes() == "ä".encode()
    assert not temporary.exists()


@pytest.mark.parametrize("old", [None, "file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_replace_takes_the_place_of_a_file_or_folder(tmp_path, old, new):
    path, temporary = tmp_path / "path", tmp_path / "temporary"
    for kind, where in ((old, path), (new, temporary)):
        if kind == "file":
            where.write_text("content")
        elif kind == "folder":
            make_empty_folder(where)
            (where / ("old" if where == path else "new")).touch()
    replace(temporary, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_dir() == (new == "folder")
    assert new == "file" or [file.name for file in path.iterdir()] == ["new"]


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("old", [False, True])
def test_permissions_follow_the_umask(tmp_path, mask, mode, old):
    path = tmp_path / "file"
    if old:
        path.touch(0o600)
    with umask(mask):
        write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_links_at_the_temporary_name_are_not_followed(tmp_path, target):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    (elsewhere / "folder").mkdir()
    temporary_path(tmp_path / "report").symlink_to(elsewhere / target)
    write_text(tmp_path / "report", "new")
    assert (tmp_path / "report").read_text() == "new"
    assert not (tmp_path / "report").is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["file", "folder"]
    assert (elsewhere / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "report"]


@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_links_at_the_target_are_replaced(tmp_path, target):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "report").symlink_to(tmp_path / target)
    write_text(tmp_path / "report", "new")
    assert (tmp_path / "report").read_text() == "new"
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "report"]


def test_link_that_appears_after_the_check_is_an_error(tmp_path, monkeypatch):
    """Another process puts a link at the temporary name between removing and creating it."""
    (tmp_path / "precious").write_text("precious")
    real = os.open

    def put_link_first(path, flags, mode=0o777, **more):
        if str(path).endswith(".tmp") and flags & os.O_CREAT:
            os.symlink(tmp_path / "precious", path)
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", put_link_first)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "report", "new")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_full_disk_keeps_the_old_file_and_names_it(tmp_path, monkeypatch, number):
    def fail(self, *_, **__):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "report.md"
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named_by_the_target(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "gone" / "report.md", "new")
    assert caught.value.filename == str(tmp_path / "gone" / "report.md")


def test_halves_of_surrogate_pairs_are_escaped(tmp_path):
    write_text(tmp_path / "file", '"a\ud83d"')
    assert (tmp_path / "file").read_text() == '"a\\ud83d"'


def test_remove_removes_a_link_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").exists()
