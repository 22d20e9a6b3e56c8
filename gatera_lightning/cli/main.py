"""``python -m gatera_lightning``: this project's own verbs, LightningCLI's, and what a user sees when something is wrong."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TextIO

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import DistNetworkError
from typing_extensions import override

from gatera_lightning.adapters.serialization import AdapterFileError
from gatera_lightning.callbacks.progress_bar import disable_library_bars
from gatera_lightning.cli.commands.chat import chat, generate
from gatera_lightning.cli.commands.compare import compare
from gatera_lightning.cli.commands.demo import demo
from gatera_lightning.cli.commands.estimate import plan
from gatera_lightning.cli.commands.export import export
from gatera_lightning.cli.commands.gates import gates
from gatera_lightning.cli.commands.preview import preview
from gatera_lightning.cli.commands.submit import submit
from gatera_lightning.cli.lightning_cli import PROG, GateRACLI, with_found_configs
from gatera_lightning.errors import CheckpointError, ConfigError, NonFiniteLossError, Preempted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 for a run that is done or requeued, 1 for a failed one, 2 for a configuration that cannot work, 75 (try again) for a run
    that a signal ended, saved and not requeued.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for noise in (
        ".*isinstance\\(treespec, LeafSpec\\)",
        ".*does not have many workers",
        ".*recommended to use `self.log.*sync_dist=True",
    ):
        warnings.filterwarnings(
            "ignore", message=noise
        )  # of our dependencies about each other; nothing a user could change
    _show_own_log()
    if not sys.stderr.isatty():  # bars are drawn with control characters
        disable_library_bars()
    try:
        match args[:1]:
            case ["demo"]:
                demo(args[1:])
            case ["preview"]:
                preview(args[1:])
            case ["plan"]:
                plan(args[1:])
            case ["gates"]:
                gates(args[1:])
            case ["chat"]:
                chat(args[1:])
            case ["generate"]:
                generate(args[1:])
            case ["export"]:
                export(args[1:])
            case ["submit"]:
                submit(args[1:])
            case ["compare"]:
                compare(args[1:])
            case _:
                GateRACLI(with_found_configs(args))
    except AdapterFileError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except ConfigError as error:
        if _rank() and error.on_every_process:
            _let_the_first_speak()
        else:
            count = len(error.problems)
            heading = (
                "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
            )
            print(
                f"{_who()}: {heading}:",
                *(f"  - {problem}" for problem in error.problems),
                sep="\n",
                file=sys.stderr,
            )
        return 2
    except (NonFiniteLossError, CheckpointError) as error:
        if _rank():  # both are raised by all processes together
            _let_the_first_speak()
        else:
            print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    except DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR', 'this machine')}, port {os.environ.get('MASTER_PORT', 'unknown')}"
        print(
            f"{_who()}: the processes cannot meet at {place}: {str(error).splitlines()[0]}", file=sys.stderr
        )
        print("  - another job may use the port: set MASTER_PORT to a free one", file=sys.stderr)
        return 1
    except Preempted as error:
        if _rank() == 0:
            print(f"{PROG}: {error}", file=sys.stderr)
        return 0 if error.requeued else 75
    return 0


def _let_the_first_speak() -> None:
    """Before this process ends: torchrun and srun then end all others, and the first has perhaps yet to say why."""
    if {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        time.sleep(5)


def _who() -> str:
    """The program, and which process it is where there are several."""
    return f"{PROG} (process {_rank()})" if _rank() else PROG


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a live bar puts itself in its place, and lines above itself."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # setStream would flush the one before, which may be closed
        super().emit(record)


def _show_own_log() -> None:
    """Lines such as "continuing from …" on the first process, warnings on all; where logging is set up, as it is set up."""
    own = logging.getLogger("gatera_lightning")
    if not own.hasHandlers():
        own.addHandler(_Stderr())
        own.setLevel(logging.WARNING if _rank() else logging.INFO)
    for lightning in (logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")):
        if any(
            type(handler) is logging.StreamHandler for handler in lightning.handlers
        ):  # its own; a plain one
            lightning.handlers = [_Stderr()]


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)  # set from the environment, and by the strategy


if __name__ == "__main__":
    sys.exit(main())
