"""The last words of the program: one message for every way in which a subcommand can end."""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress

from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.console import global_rank
from gatera_lightning.cli.error_translation import translate
from gatera_lightning.cli.exit_codes import ExitCode
from gatera_lightning.errors import Interrupted, Preempted, printable

TRACEBACK_FLAG = "--traceback"
TRACEBACK_VARIABLE = "GATERA_TRACEBACK"

_ENDED_BY_SIGNALS = ("serve",)
"""Subcommands that have no other end."""


def take_traceback_flag(args: Sequence[str]) -> tuple[list[str], bool]:
    """Split a command line into the flags of its subcommand and whether errors show their traceback."""
    others = [arg for arg in args if arg != TRACEBACK_FLAG]
    wanted = os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")
    return others, wanted or len(others) < len(args)


def report(error: BaseException, command: str, received: int | None, *, show_traceback: bool) -> int | None:
    """Print why a subcommand ended.

    Args:
        error: What it raised.
        command: The subcommand; empty if none was recognized.
        received: The last signal that arrived, if any.
        show_traceback: Whether to print the traceback above the message.

    Returns:
        The exit code; None for a SystemExit that needs no message, such as that of `--help`.
    """
    if _output_is_closed(error):
        discard_output()
        return ExitCode.CLOSED_OUTPUT
    ended = _ending_signal(error, received)
    if isinstance(error, SystemExit) and ended is None:
        return None
    if show_traceback:
        _print(*"".join(traceback.format_exception(error)).rstrip().splitlines())
    if ended is not None:
        if global_rank() == 0:
            activity = ended.activity or command
            ended = Interrupted(ended.number, activity, unfinished=activity not in _ENDED_BY_SIGNALS)
            _print(f"{PROGRAM}: {ended}")
        return 128 + ended.number
    translation = translate(error, command)
    if translation.on_every_rank and global_rank():
        if not isinstance(error, Preempted):
            _wait_for_rank_zero()
    else:
        _print(f"{_sender()}: {translation.lines[0]}", *translation.lines[1:])
    return translation.code


def flush_output() -> None:
    """Write what is buffered now: an error at the interpreter's exit could not be reported."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def discard_output() -> None:
    """Send what is still buffered nowhere: Python flushes standard output and error when it exits."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _ending_signal(error: BaseException, received: int | None) -> Interrupted | None:
    """The signal behind an exception; None if there is none."""
    for one in _chain(error):
        if isinstance(one, Interrupted):
            return one
        if isinstance(one, KeyboardInterrupt):  # Lightning replaces it by SystemExit
            return Interrupted(signal.SIGINT)
        if type(one).__name__ == "SIGTERMException":  # Lightning's; its exit code would be 0
            return Interrupted(signal.SIGTERM)
    # Whatever else follows a signal is its consequence: a data worker that died first, or a library that
    # caught the exception inside of an import, whose modules are then incomplete.
    if received is None or isinstance(error, SystemExit | Preempted):
        return None
    return Interrupted(received)


def _output_is_closed(error: BaseException) -> bool:
    """Whether an error comes from writing to a pipe that nobody reads any more."""
    broken = any(isinstance(one, BrokenPipeError) for one in _chain(error))
    return broken and any(_has_no_reader(stream) for stream in (sys.stdout, sys.stderr))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it replaced: rich, for one, raises SystemExit for a broken pipe."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _has_no_reader(stream: object) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[attr-defined]
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False


def _print(*lines: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads standard error
        print(*(printable(line) for line in lines), sep="\n", file=sys.stderr, flush=True)


def _wait_for_rank_zero() -> None:
    """Give rank 0 time to print the error: torchrun and srun end all other ranks once one has failed."""
    if {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        time.sleep(5)


def _sender() -> str:
    """The program's name, with the rank where several ranks may print."""
    return f"{PROGRAM} (rank {global_rank()})" if global_rank() else PROGRAM
