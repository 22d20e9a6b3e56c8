"""Run programs that may hang; a test then fails with the stacks of all their processes."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path


def run_bounded(command, *, timeout, env=None, **options):
    """Run a program to its end, and return it as ``subprocess.run`` does, with its output as text.

    If it runs longer than ``timeout`` seconds, every process of its group is aborted and prints where it was:
    the ranks of a run, and the workers of their loaders.

    Raises:
        AssertionError: If it runs longer than that; the message ends with what it printed.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as program:
        try:
            output, errors = program.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            threading.Thread(target=_abort_group, args=[program.pid]).start()  # it fills the pipe read below
            printed = "".join(text for text in program.communicate() if text)
            message = f"still running after {timeout} s: {' '.join(map(str, command))}\n{printed}"
            raise AssertionError(message) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, program.returncode, output, errors)


def _abort_group(group):
    """Abort one process after the other, so that their stacks do not mix; Linux only."""
    os.killpg(group, signal.SIGSTOP)  # none reacts to the end of another
    for pid in sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                os.kill(pid, signal.SIGABRT)
                os.kill(pid, signal.SIGCONT)
                time.sleep(1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
