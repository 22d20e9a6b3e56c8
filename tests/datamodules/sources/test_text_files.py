"""Text files: compressed ones, and whatever is not a text file."""

import gzip
import os
from pathlib import Path

import pytest

from gatera_lightning.datamodules.sources.files import read_rows
from gatera_lightning.datamodules.sources.text_files import local_file, read_text
from gatera_lightning.errors import ConfigError

ROW = b'{"a": "x"}\n'


def gz(content):
    """Compress without the time, which would make test ids differ."""
    return gzip.compress(content, mtime=0)


def error_of(path):
    with pytest.raises(ConfigError) as caught:
        read_text(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_compressed_text_is_read(tmp_path):
    path = tmp_path / "rows.JSONL.gz"
    path.write_bytes(gz(b"\xef\xbb\xbf" + ROW) + gz(ROW))  # as `cat a.gz b.gz` makes it
    assert read_text(str(path)) == (ROW * 2).decode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json.gz", gz(ROW * 100)[:-9], ": not a valid gzip file ("),
        ("plain.json.gz", ROW, ": not a valid gzip file ("),
        ("broken.json.gz", gz(ROW)[:12] + b"\xff" * 30, ": not a valid gzip file ("),
        (
            "packed.json",
            gz(ROW),
            ": not UTF-8 text (invalid start byte at byte 1); it is comp",
        ),
        ("wide.json", ROW.decode().encode("utf-16-le"), ": not a text file (NUL at byte 1); if it is UTF-16"),
        ("marked.json", ROW.decode().encode("utf-16"), ": not UTF-8 text (invalid start byte at byte 0); it"),
        ("big.json", b"\xfe\xff" + ROW.decode().encode("utf-16-be"), ": not UTF-8 text ("),
        ("zeros.csv", bytes(9), ": not a text file (NUL at byte 0)"),
        ("latin.csv", "é".encode("latin-1"), ": not UTF-8 text (unexpected end of data at byte 0)"),
        ("cut.jsonl", "é".encode()[:1], ": not UTF-8 text (unexpected end of data at byte 0)"),
    ],
)
def test_what_is_no_text_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).startswith(message)


def test_pipes_folders_devices_and_loops_are_named(tmp_path):
    """Opening a pipe without a writer would wait for ever; a device may never end."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    not_regular = ": cannot be read (not a regular file, but a pipe or a device)"
    assert error_of(tmp_path / "pipe.json") == error_of(tmp_path / "zero.json") == not_regular
    assert error_of(tmp_path / "folder.json") == ": cannot be read (Is a directory)"
    assert error_of(tmp_path / "loop.json").startswith(": cannot be read (Too many levels of symbolic links")
    assert error_of(tmp_path / ("long" * 99 + ".json")) == ": cannot be read (File name too long)"
    with pytest.raises(ConfigError, match="pipe or a device"):
        list(read_rows(str((tmp_path / "pipe.json").rename(tmp_path / "pipe.parquet"))))


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.json").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error_of(tmp_path / "secret.json") == ": cannot be read (Permission denied)"


def test_control_characters_of_names_are_escaped(tmp_path):
    with pytest.raises(ConfigError) as caught:
        local_file(f"{tmp_path}/\x1b[31mred\u202e.json")
    assert str(caught.value).startswith(f"{tmp_path}/\\u001b[31mred\\u202e.json: cannot be read (")
    with pytest.raises(ConfigError, match="cannot be read"):
        local_file("a\0b.json")
