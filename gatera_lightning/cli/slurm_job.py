"""A SLURM job that trains: what it asks SLURM for, and its batch script."""

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gatera_lightning.errors import ConfigError

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")

# SLURM parses #SBATCH lines by its own rules, in which the shell's quotes do not work.
_UNSAFE = re.compile(r"[\s'\"\\#]")


@dataclass(frozen=True)
class SlurmJob:
    """The resources of a job, and how its script starts the program."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    options: dict[str, str]
    """Further `#SBATCH` options; each value is written as it is."""

    signal_seconds: int
    """How long before the time limit SLURM sends SIGUSR1."""

    root: Path
    """The absolute path of the folder with one folder per job."""

    setup: str
    """Shell lines that run before the program."""

    python: str
    """The Python interpreter."""

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "SlurmJob":
        """Create a job from the flags of `submit`.

        Raises:
            ConfigError: With every flag that cannot work.
        """
        ranks = args.processes_per_node or args.gpus_per_node or 1
        root = args.root.absolute()
        if problems := [
            *_number_problems(args),
            *_time_problems(args),
            *_rank_problems(args, ranks),
            *_text_problems(args, root),
        ]:
            raise ConfigError(problems)
        options = {"partition": args.partition, "account": args.account, "time": args.time, "mem": args.mem}
        options |= {"gpus-per-node": args.gpus_per_node or None, "cpus-per-task": args.cpus_per_task}
        return cls(
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            ranks_per_node=ranks,
            options={name: str(value) for name, value in options.items() if value is not None},
            signal_seconds=args.signal_seconds,
            root=root,
            setup=args.setup,
            python=args.python,
        )

    def script(self, name: str, logger_settings: dict[str, str], flags: Sequence[str] = ()) -> str:
        """Render the batch script from the shipped template `slurm/train.sbatch`.

        Args:
            name: The job's name.
            logger_settings: Arguments of the run's logger, each value quoted for the shell.
            flags: Further flags of `fit`, quoted for the shell: what a config cannot say.

        Returns:
            The text of the script.
        """
        template = resources.files("gatera_lightning.cli_configs") / "slurm" / "train.sbatch"
        values = {
            "NAME": name,
            "NODES": str(self.nodes),
            "TASKS": str(self.ranks_per_node),
            "OPTIONS": "\n".join(f"#SBATCH --{option}={value}" for option, value in self.options.items()),
            "SIGNAL_SECONDS": str(self.signal_seconds),
            "OUTPUT": str(self.root),
            "ROOT": shlex.quote(str(self.root)),
            "SETUP": self.setup,
            "PYTHON": shlex.quote(self.python),
            "LOGGER": " ".join(
                [
                    *(f"--trainer.logger.init_args.{key} {value}" for key, value in logger_settings.items()),
                    *flags,
                ]
            ),
        }
        lines = []
        for line in template.read_text(encoding="utf-8").splitlines():
            filled = re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], line)
            if filled.strip() or not line.strip():  # a placeholder without a value leaves no empty line
                lines.append(filled.rstrip())
        return "\n".join(lines) + "\n"


def time_limit_seconds(time: str) -> int:
    """Convert a time limit as SLURM does.

    Args:
        time: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, or `days-hours` with optional minutes and
            seconds.
    """
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _number_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_task", "signal_seconds"):
        value, least = getattr(args, name), 0 if name == "gpus_per_node" else 1
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')}: {value}; accepted: an integer of at least {least}")
    return problems


def _time_problems(args: argparse.Namespace) -> list[str]:
    if args.time is None:
        return []
    if not _TIME.fullmatch(args.time):
        accepted = "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"
        return [f"--time: {args.time!r}; accepted: {accepted}"]
    if time_limit_seconds(args.time) <= args.signal_seconds:
        return [
            f"--signal-seconds: {args.signal_seconds}, with --time {args.time}: "
            "SLURM would end the job as soon as it starts, every time; accepted: less than the time limit"
        ]
    return []


def _rank_problems(args: argparse.Namespace, ranks: int) -> list[str]:
    problems = []
    if args.processes_per_node is not None and args.gpus_per_node not in (0, args.processes_per_node):
        problems.append(
            f"--processes-per-node: {args.processes_per_node} for {args.gpus_per_node} GPUs; "
            "accepted: one process per GPU, or --gpus-per-node 0"
        )
    for flag, given, size in (
        ("--trainer.num_nodes", args.num_nodes, args.nodes),
        ("--trainer.devices", args.devices, ranks),
    ):
        if given not in (None, str(size)):
            problems.append(f"{flag}: {given}; accepted: {size}, which --nodes and --gpus-per-node give")
    return problems


def _text_problems(args: argparse.Namespace, root: Path) -> list[str]:
    problems = []
    if _UNSAFE.search(str(root)) or "%" in str(root):  # SLURM replaces %j and the like in file names
        accepted = "a path without white space, quotes, backslashes, # and %"
        problems.append(f"--root: {str(root)!r}; accepted: {accepted}")
    for name in ("partition", "account", "mem"):
        if _UNSAFE.search(getattr(args, name) or ""):
            accepted = "a value without white space, quotes, backslashes and #"
            problems.append(f"--{name}: {getattr(args, name)!r}; accepted: {accepted}")
    return problems
