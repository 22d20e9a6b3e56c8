"""`submit`: renders a recipe as a SLURM job, checks it, and submits it."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.backbone.source import hub_id
from gatera_lightning.checkpointing.atomic_files import write_text
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import RecipeCLI
from gatera_lightning.cli.slurm_job import SlurmJob
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.cli.trusted_code import REMOTE_CODE
from gatera_lightning.cli.validation import validate_config
from gatera_lightning.errors import ConfigError
from gatera_lightning.terminal.printing import print_text

# Loggers that write to save_dir/name/version.
_VERSIONED_LOGGERS = {"TensorBoardLogger", "CSVLogger"}


def submit(argv: Sequence[str]) -> None:
    """Submit a job that runs `fit`, or print its script with `--dry-run`.

    The script and the resolved config are stored in `ROOT/job-ID`, which is the run's folder too.

    Args:
        argv: The flags of `submit`, and any flags of `fit`.

    Raises:
        ConfigError: Something cannot work, SLURM is missing, or SLURM rejects the script.
    """
    args, fit_flags = _parser().parse_before_fit(argv)
    job = SlurmJob.from_arguments(args)
    recipe = _ResolvedRecipe(["fit", *fit_flags], job)
    trust = (f"--{REMOTE_CODE} true",) if recipe.model.backbone.trust_remote_code else ()
    script = job.script(recipe.job_name, recipe.logger_settings, trust)
    syntax = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    if syntax.returncode:
        raise ConfigError(f"--setup: makes the script invalid bash: {syntax.stderr.strip()}")
    if args.dry_run:
        print_text(script, end="")
        return
    if missing := [tool for tool in ("sbatch", "srun", "scontrol") if shutil.which(tool) is None]:
        raise ConfigError(
            f"submit: this machine does not have {', '.join(missing)}; "
            "accepted: a login node of SLURM, or --dry-run"
        )
    if not args.skip_download:
        recipe.download()
    number = _submit_held(script)
    folder = job.root / f"job-{number}"
    try:
        folder.mkdir(parents=True)
        write_text(folder / "job.sbatch", script)
        write_text(folder / "submitted.yaml", recipe.resolved_config)
        _run_slurm("scontrol", "release", number)
    except (OSError, ConfigError) as error:  # a held job would wait forever
        subprocess.run(["scancel", number], capture_output=True)
        raise ConfigError(f"submit: job {number} is cancelled: {error}") from error
    print_text(f"job {number}: {folder}")
    print_text(f"  log:     tail -F {folder / 'slurm.log'}\n  cancel:  scancel {number}")


class _ResolvedRecipe(RecipeCLI):
    """The complete, checked config of the job's `fit`."""

    def __init__(self, args: list[str], job: SlurmJob) -> None:
        self.job = job
        super().__init__(args)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse with the job's nodes and devices; check all but the devices of this machine."""
        super().parse_arguments(parser, args)
        trainer = self.config.fit.trainer
        trainer.num_nodes, trainer.devices = self.job.nodes, self.job.ranks_per_node
        trainer.accelerator = "gpu" if self.job.gpus_per_node else "cpu"
        validate_config(parser, self.config)
        if self.config.fit.ckpt_path not in (None, "last"):
            raise ConfigError(
                f"ckpt_path: {self.config.fit.ckpt_path!r}; "
                "accepted: null, since a job resumes from its own newest checkpoint; "
                "to start from an adapter, set model.warm_start"
            )
        if isinstance(trainer.logger, list):
            raise ConfigError(
                f"trainer.logger: {len(trainer.logger)} loggers; "
                "accepted: one, which writes to the job's folder"
            )
        resolved = self.config.fit.clone()
        resolved.pop("config", None)
        self.resolved_config: str = self._parser("fit").dump(resolved, skip_none=False)

    @property
    def job_name(self) -> str:
        """The logger's name, if it has one."""
        logger = self.config.fit.trainer.logger
        name = logger.get("init_args", {}).get("name") if hasattr(logger, "get") else None
        return re.sub(r"[^\w.-]", "_", name or "gatera")

    @property
    def logger_settings(self) -> dict[str, str]:
        """Arguments, quoted for the shell, with which the logger writes to the job's folder."""
        logger = self.config.fit.trainer.logger
        kind = logger.get("class_path", "").rpartition(".")[2] if hasattr(logger, "get") else ""
        if kind in _VERSIONED_LOGGERS:
            return {"save_dir": shlex.quote(str(self.job.root)), "name": '""', "version": "job-$SLURM_JOB_ID"}
        return {"save_dir": '"$run"'} if kind else {}

    def download(self) -> None:
        """Fill the caches that the compute nodes share with this machine: weights, tokenizer, tokenized data.

        Raises:
            ConfigError: The weights cannot be downloaded, or the data cannot be read.
        """
        name = hub_id(self.model.backbone.id)
        if name is not None:
            revision = self.model.backbone.revision
            patterns = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
            try:
                folder = snapshot_download(
                    name, revision=revision, allow_patterns=["*.safetensors", *patterns]
                )
                if not any(Path(folder).glob("*.safetensors")):
                    snapshot_download(name, revision=revision, allow_patterns=["*.bin"])
            except OSError as error:
                raise ConfigError(
                    f"model.backbone.id: cannot download {name!r} from the hub ({type(error).__name__}); "
                    "accepted: a model that can be downloaded or is cached, a folder, or --skip-download"
                ) from error
        self.datamodule.connect(load_tokenizer(self.model.backbone))
        self.datamodule.setup("fit")


def _submit_held(script: str) -> str:
    """Submit a script and return the job's number; it is held because its folder does not exist yet."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        _run_slurm("sbatch", "--test-only", file.name)
        return _run_slurm("sbatch", "--parsable", "--hold", file.name).split(";")[0].strip()


def _run_slurm(*command: str) -> str:
    """Run a command of SLURM and return what it prints; raise ConfigError with its error message."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{shlex.join(command[:-1])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "submit",
        usage="%(prog)s --config CONFIG ... --nodes N --gpus-per-node G [options] [any flag of fit]",
        description="Submit fit as a SLURM job that requeues itself before its time limit and resumes from "
        "its newest checkpoint.",
        epilog=f"All other flags are those of fit: see {PROGRAM} fit --help",
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes; default: 1")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=1,
        help="GPUs, with one process each; 0 for CPU nodes; default: 1",
    )
    parser.add_argument("--processes-per-node", type=int, help="processes on a CPU node; default: 1")
    parser.add_argument("--cpus-per-task", type=int, help="CPU cores of a process")
    parser.add_argument("--mem", help="memory of a node, such as 200G")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--time", help="time limit, such as 12:00:00; the job requeues itself before it is reached"
    )
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=300,
        help="seconds before the time limit at which the job saves and requeues itself; longer than an "
        "optimizer step and than a validation; default: 300",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("jobs"), help="folder in which each job gets its own; default: jobs"
    )
    parser.add_argument(
        "--setup", default="", help="shell lines that run before the program, such as 'module load cuda'"
    )
    parser.add_argument("--python", default=sys.executable, help="Python interpreter; default: this one")
    parser.add_argument(
        "--skip-download", action="store_true", help="do not download weights and data before submitting"
    )
    # The job determines these two settings; flags that contradict it are reported.
    for flag in ("--trainer.num_nodes", "--trainer.devices"):
        parser.add_argument(flag, dest=flag.rpartition(".")[2], help=argparse.SUPPRESS)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script instead of submitting it"
    )
    return parser
