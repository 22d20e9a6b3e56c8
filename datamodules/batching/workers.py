"""How loader workers start and end: they ignore the signals on which the training process saves."""

import atexit
import multiprocessing
import multiprocessing.util  # registers multiprocessing's own exit hook, before the one below
import signal
from typing import Any

WORKER_TIMEOUT = 600.0
"""Seconds that a batch may take, which takes milliseconds.

A worker is a fork. If another thread holds a lock at that moment, the worker can wait for it forever; CPython
had such a lock itself (https://github.com/python/cpython/issues/112275). Without this limit, the process
would wait for the worker, and the other ranks for the process.
"""


def worker_options(count: int) -> dict[str, Any]:
    """Return the arguments of a DataLoader that concern its workers.

    Args:
        count: Number of workers; 0 loads in the process itself.
    """
    return {
        "num_workers": count,
        "worker_init_fn": ignore_signals,
        "timeout": WORKER_TIMEOUT if count else 0.0,
    }


def ignore_signals(worker_id: int) -> None:
    """Ignore SIGTERM and SIGUSR1, which SLURM sends to every process of a job. A ``worker_init_fn``."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # registered after multiprocessing's own hook, and therefore run before it
def end_workers() -> None:
    """End daemonic child processes, such as the workers of a loader that an exception interrupted.

    ``multiprocessing`` would do the same, but wait forever for workers that ignore SIGTERM. It still handles
    child processes that are not daemons.
    """
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if not daemons:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error about each of them
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        daemon.join(timeout=0.5)
        if daemon.is_alive():
            daemon.kill()
