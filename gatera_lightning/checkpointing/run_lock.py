"""A run folder belongs to one run at a time: the run holds a lock on a file in it.

The operating system owns the lock, so taking it is atomic, and it ends with the process, however that ends.
The file stays: removing it would let a third run lock a file that nobody else sees.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from gatera_lightning.checkpointing.output_check import MIB, file_problem, folder_problem

log = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
"""The file in a run folder that its run has locked; it says which run that is."""

_ROOM = 16 * MIB  # for logs and the checkpoints of a small adapter; the size of this run's is not known yet

_held: dict[Path, IO[str]] = {}  # the folders of this process's runs


def claim(folder: Path) -> str | None:
    """Claim a run folder for this process until it ends or calls :func:`release`.

    Only rank 0 of a run calls this. A process that holds the folder already keeps it.

    Args:
        folder: The run folder; it is created.

    Returns:
        Why the folder cannot be used, with the run that holds it; None if this process holds it now.
    """
    folder = folder.resolve()
    if folder in _held:
        return None
    if problem := folder_problem(folder, _ROOM):
        return f"the run folder {folder} cannot be written ({problem}); accepted: another one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LOCK_FILE).is_symlink():  # writing would change a file outside of the run
            return f"the run folder {folder} has a link {LOCK_FILE}; accepted: a folder without it"
        if problem := file_problem(folder / LOCK_FILE):
            return f"the run folder {folder} cannot be used ({problem}); accepted: another one"
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        return f"the run folder {folder} cannot be written ({error.strerror or error}); accepted: another one"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = _owner(file)
            if not _started_again(owner):
                file.close()
                return (
                    f"the run folder {folder} belongs to a run that is still going: {_describe(owner)}; "
                    "accepted: another folder or version for this run, or wait until that one has ended"
                )
            log.warning("%s is still locked by an earlier start of this job (%s)", folder, _describe(owner))
        else:
            log.warning("%s cannot be locked against a second run (%s)", folder, error.strerror)
    try:
        file.truncate(0)
        json.dump(_this_run(), file)
        file.flush()
    except OSError as error:
        file.close()
        return f"the run folder {folder} cannot be written ({error.strerror or error}); accepted: another one"
    _held[folder] = file
    return None


def release(folder: Path) -> None:
    """Give up a folder that this process has claimed; do nothing if it has not."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def _this_run() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _owner(file: IO[str]) -> dict[str, Any]:
    """What a lock file says about its run; empty if it is not written yet."""
    try:
        file.seek(0)
        owner = json.load(file)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _started_again(owner: dict[str, Any]) -> bool:
    """Whether the owner is an earlier start of this SLURM job, which has ended before SLURM requeued it.

    A file server may keep the lock of a node that died.
    """
    this = _this_run()
    restarts = owner.get("restarts")
    same_job = this["job"] is not None and owner.get("job") == this["job"]
    return same_job and isinstance(restarts, int) and restarts < int(this["restarts"])


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "it has just started"
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, started {owner.get('started')}"
