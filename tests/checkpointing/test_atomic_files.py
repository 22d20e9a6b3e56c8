"""Files and folders appear complete under their names, or not at all."""

import pytest

from gatera_lightning.checkpointing.atomic_files import (
    atomic_file,
    make_empty_folder,
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
