"""Run programs that may hang; a test then fails with the stacks of all their processes."""

import contextlib
import os
import signal
import subprocess


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
            os.killpg(program.pid, signal.SIGABRT)
            printed = "".join(text for text in _printed_at_end(program) if text)
            message = f"still running after {timeout} s: {' '.join(map(str, command))}\n{printed[-20_000:]}"
            raise AssertionError(message) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, program.returncode, output, errors)


def _printed_at_end(program):
    try:
        return program.communicate(timeout=30)
    except subprocess.TimeoutExpired:  # a process that an abort does not end
        os.killpg(program.pid, signal.SIGKILL)
        return program.communicate()
