"""Check that results can be written before anything expensive is computed."""

import errno
import os
import resource
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from gatera_lightning.checkpointing.atomic_files import TEMPORARY

MIB = 1 << 20
# What file systems answer that cannot reserve room; they may still have it.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def folder_problem(folder: Path, room: int = MIB) -> str:
    """Return why files cannot be written to a folder; an empty string if they can.

    A temporary file of the size is written and removed, because neither permissions nor the free space that a
    file system reports tell of quotas and read-only mounts.

    Args:
        folder: The folder, which does not have to exist: then it must be possible to create it.
        room: Bytes that must fit.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        if not stat.S_ISDIR(os.stat(place).st_mode):
            return f"{place} is not a folder"
        with tempfile.NamedTemporaryFile(dir=place, prefix=".check-", suffix=TEMPORARY) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, _of_one_file(room))
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
    except OSError as error:
        return f"{place}: {error.strerror or error}"
    return ""


def _of_one_file(room: int) -> int:
    """The part of the room that one file may take where the size of files is limited, as on some clusters."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return room if limit == resource.RLIM_INFINITY else min(room, max(limit, MIB))


def file_problem(path: Path, room: int = MIB) -> str:
    """Return why a file cannot be written or replaced; an empty string if it can.

    Args:
        path: The file, in a folder that must exist.
        room: Bytes that must fit.
    """
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return f"{path} is a folder"
        if not stat.S_ISREG(mode):
            return f"{path} is a pipe or a device"
        if not os.access(path, os.W_OK):
            return f"{path} is read-only"
    return folder_problem(path.parent, room)
