"""``submit``: a recipe as a SLURM job — rendered, checked, kept with its configuration, and handed in."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from gatera_lightning.backbone.loading import hub_id, load_tokenizer
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import RecipeCLI
from gatera_lightning.cli.validation import validate_config
from gatera_lightning.errors import ConfigError

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
_UNREADABLE = re.compile(
    r"[\s'\"\\#]"
)  # SLURM reads #SBATCH lines by rules of its own, which are not the shell's
_NAMED = {"TensorBoardLogger", "CSVLogger"}  # loggers whose folder is save_dir/name/version


def submit(argv: Sequence[str]) -> None:
    """Print (``--dry-run``) or hand in a job that runs ``fit`` with everything else in ``argv``.

    The script and the resolved configuration lie in ``ROOT/job-ID``, the run's own folder. Raises ConfigError for what cannot
    work, a machine without SLURM and a script that SLURM refuses included.
    """
    own, others = _parser().parse_known_args(argv)
    job = Job.of(own)
    config = _Resolved(["fit", *others], job)
    script = render(job, config.name, config.logger)
    syntax = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    if syntax.returncode:
        raise ConfigError(f"--setup: the script is not valid bash with it: {syntax.stderr.strip()}")
    if own.dry_run:
        print(script, end="")
        return
    if missing := [tool for tool in ("sbatch", "srun", "scontrol") if shutil.which(tool) is None]:
        raise ConfigError(
            f"submit: {', '.join(missing)} is not on this machine; accepted: a login node of SLURM, or --dry-run"
        )
    if not own.skip_download:
        config.fetch()
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        _slurm("sbatch", "--test-only", file.name)
        # Held until its folder is there: a job may start before the next line runs.
        number = _slurm("sbatch", "--parsable", "--hold", file.name).split(";")[0].strip()
    run = job.root / f"job-{number}"
    try:
        run.mkdir(parents=True)
        (run / "job.sbatch").write_text(script)
        (run / "submitted.yaml").write_text(config.text)
        _slurm("scontrol", "release", number)
    except (OSError, ConfigError) as error:  # else it would wait for ever
        subprocess.run(["scancel", number], capture_output=True)
        raise ConfigError(f"submit: job {number} is cancelled: {error}") from error
    print(f"job {number}: {run}\n  watch it:  tail -F {run / 'slurm.log'}\n  end it:    scancel {number}")


def _seconds(time: str) -> int:
    """As SLURM reads it: minutes, minutes:seconds, hours:minutes:seconds; behind days-, hours come first."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for."""

    nodes: int
    gpus_per_node: int
    processes_per_node: int
    options: dict[str, str]
    signal_seconds: int
    root: Path
    setup: str
    python: str

    @classmethod
    def of(cls, own: argparse.Namespace) -> "Job":
        """Raises ConfigError with everything that cannot work."""
        problems = []
        for name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_task", "signal_seconds"):
            least = 0 if name == "gpus_per_node" else 1
            if getattr(own, name) is not None and getattr(own, name) < least:
                problems.append(
                    f"--{name.replace('_', '-')}: {getattr(own, name)}; accepted: an integer of at least {least}"
                )
        if own.time is not None and not _TIME.fullmatch(own.time):
            problems.append(
                f"--time: {own.time!r}; accepted: minutes, hours:minutes:seconds, or days-hours:minutes:seconds"
            )
        elif own.time is not None and _seconds(own.time) <= own.signal_seconds:
            problems.append(
                f"--signal-seconds: {own.signal_seconds} of --time {own.time}: the job would be told to end at once, again and "
                "again; accepted: less than the time"
            )
        if own.processes_per_node is not None and own.gpus_per_node not in (0, own.processes_per_node):
            problems.append(
                f"--processes-per-node: {own.processes_per_node} for {own.gpus_per_node} GPUs; accepted: one a GPU, or "
                "--gpus-per-node 0"
            )
        processes = own.processes_per_node or own.gpus_per_node or 1
        for flag, given, size in (
            ("--trainer.num_nodes", own.num_nodes, own.nodes),
            ("--trainer.devices", own.devices, processes),
        ):
            if given not in (None, str(size)):
                problems.append(
                    f"{flag}: {given}; accepted: {size}, as the job has it, by --nodes and --gpus-per-node"
                )
        root = own.root.absolute()
        if _UNREADABLE.search(str(root)) or "%" in str(root):
            problems.append(
                f"--root: {str(root)!r}; accepted: a path without white space, quotes, backslashes, # and %"
            )
        for name in ("partition", "account", "mem"):
            if _UNREADABLE.search(getattr(own, name) or ""):
                problems.append(
                    f"--{name}: {getattr(own, name)!r}; accepted: what has no white space, quotes, backslashes or #"
                )
        if problems:
            raise ConfigError(problems)
        options = {"partition": own.partition, "account": own.account, "time": own.time, "mem": own.mem}
        options |= {"gpus-per-node": own.gpus_per_node or None, "cpus-per-task": own.cpus_per_task}
        return cls(
            own.nodes,
            own.gpus_per_node,
            processes,
            {name: str(value) for name, value in options.items() if value is not None},
            own.signal_seconds,
            root,
            own.setup,
            own.python,
        )


def render(job: Job, name: str, logger: dict[str, str]) -> str:
    """The batch script: the shipped ``slurm/train.sbatch`` with what stands between @ signs filled in."""
    text = (resources.files("gatera_lightning.cli_configs") / "slurm" / "train.sbatch").read_text(
        encoding="utf-8"
    )
    filled = {
        "NAME": name,
        "NODES": str(job.nodes),
        "TASKS": str(job.processes_per_node),
        "OPTIONS": "\n".join(f"#SBATCH --{option}={value}" for option, value in job.options.items()),
        "SIGNAL_SECONDS": str(job.signal_seconds),
        "OUTPUT": str(job.root),
        "ROOT": shlex.quote(str(job.root)),
        "SETUP": job.setup,
        "PYTHON": shlex.quote(job.python),
        "LOGGER": " ".join(f"--trainer.logger.init_args.{key} {value}" for key, value in logger.items()),
    }
    lines = []
    for line in text.splitlines():
        found = re.sub(r"@([A-Z_]+)@", lambda match: filled[match[1]], line)
        if found.strip() or not line.strip():  # what is not asked for leaves no empty line
            lines.append(found.rstrip())
    return "\n".join(lines) + "\n"


class _Resolved(RecipeCLI):
    """The whole configuration of the job's ``fit``, checked, and nothing of it started."""

    def __init__(self, args: ArgsType, job: Job) -> None:
        self.job = job
        super().__init__(args)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; nodes and devices are the job's. Raises ConfigError with all problems but those of this machine's devices."""
        super().parse_arguments(parser, args)
        trainer = self.config.fit.trainer
        trainer.num_nodes, trainer.devices = self.job.nodes, self.job.processes_per_node
        trainer.accelerator = "gpu" if self.job.gpus_per_node else "cpu"
        validate_config(parser, self.config)
        if self.config.fit.ckpt_path not in (None, "last"):
            raise ConfigError(
                f"ckpt_path: {self.config.fit.ckpt_path!r}; accepted: null, since a job goes on from its own newest "
                "checkpoint; model.warm_start begins with an adapter"
            )
        if isinstance(trainer.logger, list):
            raise ConfigError(
                f"trainer.logger: {len(trainer.logger)} of them; accepted: one, whose folder is the job's"
            )
        skipped = self.config.fit.clone()
        skipped.pop("config", None)
        self.text = self._parser("fit").dump(skipped, skip_none=False)

    @property
    def name(self) -> str:
        """What the job is called: the logger's name, where it has one."""
        logger = self.config.fit.trainer.logger
        name = logger.get("init_args", {}).get("name") if hasattr(logger, "get") else None
        return re.sub(r"[^\w.-]", "_", name or "gatera")

    @property
    def logger(self) -> dict[str, str]:
        """Where the logger writes, so that its folder is the job's."""
        logger = self.config.fit.trainer.logger
        kind = logger.get("class_path", "").rpartition(".")[2] if hasattr(logger, "get") else ""
        if kind in _NAMED:
            return {"save_dir": shlex.quote(str(self.job.root)), "name": '""', "version": "job-$SLURM_JOB_ID"}
        return {"save_dir": '"$run"'} if kind else {}

    def fetch(self) -> None:
        """Bring weights, tokenizer and tokenised rows into the caches that the compute nodes share with this machine."""
        name = hub_id(self.model.backbone.id)
        if name is not None:
            revision, patterns = (
                self.model.backbone.revision,
                ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"],
            )
            try:
                here = Path(
                    snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *patterns])
                )
                if not any(here.glob("*.safetensors")):
                    snapshot_download(name, revision=revision, allow_patterns=["*.bin"])
            except OSError as error:
                raise ConfigError(
                    f"model.backbone.id: cannot fetch {name!r} from the hub ({type(error).__name__}); accepted: what can be "
                    "fetched here or is in the cache, a folder, or --skip-download"
                ) from error
        self.datamodule.connect(load_tokenizer(self.model.backbone))
        self.datamodule.setup("fit")


def _slurm(*command: str) -> str:
    """What a command of SLURM prints. Raises ConfigError with its complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{shlex.join(command[:-1])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} submit",
        usage="%(prog)s --config CONFIG ... --nodes N --gpus-per-node G [options] [any flag of fit]",
        description="Hand a recipe in as a SLURM job that requeues itself and goes on from its newest checkpoint.",
        epilog=f"Every other flag is as for fit: see {PROGRAM} fit --help",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1, help="one process each; 0 for CPU nodes")
    parser.add_argument("--processes-per-node", type=int, help="on CPU nodes; default: 1")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--mem", help="memory of a node, such as 200G")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--time", help="limit, such as 12:00:00; the job requeues itself before it ends")
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=300,
        help="how long before the end SLURM warns: longer than a step, and than a validation; default: 300",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("jobs"), help="folder of the jobs' folders; default: jobs"
    )
    parser.add_argument(
        "--setup", default="", help="shell lines before the program, such as 'module load cuda'"
    )
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument(
        "--skip-download", action="store_true", help="do not fetch weights and rows before handing in"
    )
    for flag in (
        "--trainer.num_nodes",
        "--trainer.devices",
    ):  # the job's own decide; one that says otherwise is a mistake
        parser.add_argument(flag, dest=flag.rpartition(".")[2], help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print the script; hand nothing in")
    return parser
