"""Exit codes of the command line, and the messages of errors that a user can act on."""

import os
import sys
import time
from enum import IntEnum

from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.console import global_rank
from gatera_lightning.errors import (
    AdapterFileError,
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    Preempted,
)


class ExitCode(IntEnum):
    """What the program tells the shell, SLURM or torchrun."""

    SUCCESS = 0
    """The run is done, or its job was requeued."""

    FAILURE = 1
    """The run failed."""

    USAGE = 2
    """The configuration cannot work."""

    TRY_AGAIN = 75
    """A signal ended the run; its state is saved, and the job was not requeued (EX_TEMPFAIL)."""


def report_error(error: Exception) -> ExitCode | None:
    """Print the message of an error that a user can act on.

    Args:
        error: What a subcommand raised.

    Returns:
        The exit code, or None for an unexpected error, which should end the program with its traceback.
    """
    from torch.distributed import DistNetworkError  # only now: some subcommands do without torch

    match error:
        case AdapterFileError():
            _print(PROGRAM, str(error))
            return ExitCode.USAGE
        case ConfigError():
            _report_config_error(error)
            return ExitCode.USAGE
        case NonFiniteLossError() | CheckpointError():  # raised by all ranks together
            if global_rank():
                _wait_for_rank_zero()
            else:
                _print(PROGRAM, str(error))
            return ExitCode.FAILURE
        case DistNetworkError():
            address = os.environ.get("MASTER_ADDR", "this machine")
            port = os.environ.get("MASTER_PORT", "unknown")
            _print(
                _sender(),
                f"rendezvous failed at {address}, port {port}: {str(error).splitlines()[0]}",
                "  - another job may use the port: set MASTER_PORT to a free one",
            )
            return ExitCode.FAILURE
        case Preempted():
            if global_rank() == 0:
                _print(PROGRAM, str(error))
            return ExitCode.SUCCESS if error.requeued else ExitCode.TRY_AGAIN
    return None


def _report_config_error(error: ConfigError) -> None:
    if global_rank() and error.on_every_rank:
        _wait_for_rank_zero()
        return
    count = len(error.problems)
    heading = f"{count} problem{'' if count == 1 else 's'} in the configuration:"
    _print(_sender(), heading, *(f"  - {problem}" for problem in error.problems))


def _print(sender: str, message: str, *more_lines: str) -> None:
    print(f"{sender}: {message}", *more_lines, sep="\n", file=sys.stderr)


def _wait_for_rank_zero() -> None:
    """Give rank 0 time to print the error: torchrun and srun end all other ranks once one has failed."""
    if {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        time.sleep(5)


def _sender() -> str:
    """The program's name, with the rank where several ranks may print."""
    return f"{PROGRAM} (rank {global_rank()})" if global_rank() else PROGRAM
