"""Exit codes of the command line."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the program tells the shell, SLURM or torchrun; after a signal it is 128 plus its number."""

    SUCCESS = 0
    """The run is done, or its job was requeued."""

    FAILURE = 1
    """The run failed."""

    USAGE = 2
    """The configuration cannot work."""

    TRY_AGAIN = 75
    """A signal ended the run; its state is saved, and the job was not requeued (EX_TEMPFAIL)."""

    CLOSED_OUTPUT = 141
    """The reader of the output, such as `head`, is gone (128 plus SIGPIPE)."""
