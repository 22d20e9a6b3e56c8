"""Write files and folders so that a killed process never leaves, and a reader never finds, a partial one.

Content goes to a new temporary file beside the target, is flushed to the disk, and is then renamed. Symbolic
links are never followed: one that has the temporary name is removed, one at the target is replaced.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"
"""Suffix of files and folders that are still being written, or that a killed process left behind."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file that appears under its name only once it is complete.

    When the block ends, the temporary file is flushed to the disk and replaces ``path``. When the block
    raises, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        The temporary file to write to. It exists, and its permissions follow the umask.

    Raises:
        OSError: The file cannot be written; it names ``path``.
    """
    temporary = temporary_path(path)
    try:
        remove(temporary)  # what a killed process left, which may be a folder
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield temporary
        flush(temporary)
        replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # of a read-only file system, which would hide the first error
            remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Halves of surrogate pairs, which UTF-8 lacks, are escaped."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def temporary_path(path: Path) -> Path:
    """Return where the content of ``path`` is written before it is complete."""
    return path.with_name(path.name + TEMPORARY)


def replace(temporary: Path, path: Path) -> None:
    """Rename a complete and flushed file or folder to ``path``, and replace a file or folder of that name.

    A file replaces a file in one step. Folders cannot be exchanged in one step: between two renames neither
    of them is called ``path``. Callers that cannot afford this gap give the old folder a second name first,
    as :func:`~gatera_lightning.checkpointing.rotation.hold_current` does.
    """
    if path.is_dir() or (temporary.is_dir() and path.exists()):
        old = path.with_name(path.name + TEMPORARY + "-old")
        remove(old)
        os.replace(path, old)
        os.replace(temporary, path)
        flush(path.parent)
        remove(old)
    else:
        os.replace(temporary, path)
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_empty_folder(path: Path) -> None:
    """Create a folder, and remove the file or folder that has its name."""
    remove(path)
    path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content; do nothing if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
