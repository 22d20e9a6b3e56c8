"""The command line: LightningCLI's ``fit``, ``validate``, ``test``, ``predict``, and this project's own verbs.

Configs combine by several ``--config``: later ones win, flags win over configs. A config that is no file is looked up
among the shipped ones (``llama_commonsense.yaml``, ``overlays/lora.yaml`` or just ``lora.yaml``).
"""

import itertools
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from importlib import resources
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, get_args

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gatera_lightning.adapters.injection import find_targets
from gatera_lightning.backbone.loading import load_skeleton, load_tokenizer
from gatera_lightning.callbacks.adapter_checkpoint import TIMED_VALIDATION, AdapterCheckpoint
from gatera_lightning.callbacks.early_stopping import OptionalEarlyStopping
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.callbacks.gate_heatmap import GateHeatmap
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.callbacks.generated_samples import GeneratedSamples
from gatera_lightning.callbacks.progress_bar import StepProgressBar, disable_library_bars
from gatera_lightning.callbacks.run_summary import RunSummary
from gatera_lightning.callbacks.safe_preempt import SafePreempt
from gatera_lightning.callbacks.step_watchdog import StepWatchdog
from gatera_lightning.callbacks.tensorboard_overview import TensorBoardOverview
from gatera_lightning.callbacks.throughput import Throughput
from gatera_lightning.checkpointing.checkpoint_io import newest_sound_checkpoint
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.distributed.consistency import (
    refuse_other_number,
    refuse_without_srun,
    started_by_slurm,
)
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.likelihood_ranking import Score
from gatera_lightning.training.module import GateRAModule

log = logging.getLogger(__name__)

set_parsing_settings(docstring_parse_attribute_docstrings=True)

CALLBACKS = {
    "checkpoint": AdapterCheckpoint,
    "early_stopping": OptionalEarlyStopping,
    "evaluation": EvaluationReport,
    "gate_heatmap": GateHeatmap,
    "gate_histogram": GateHistogram,
    "generated_samples": GeneratedSamples,
    "preempt": SafePreempt,
    "throughput": Throughput,
    "watchdog": StepWatchdog,
}
ACCURACIES = tuple(f"val/accuracy_{score}" for score in get_args(Score))
PROG = "python -m gatera_lightning"
OWN_VERBS = (
    "Beside these: demo, which evaluates a small model, fine-tunes it by quickstart.yaml, and evaluates it again; preview, "
    "which shows the rows and figures of a recipe's data without its weights; plan, which says what a step costs; compare, "
    "which tests runs against each other; gates, which draws what an adapter's gates do; chat and generate, which "
    "talk to a tuned model in the terminal; submit, which hands fit in as a SLURM job; export, which makes an adapter folder "
    "of a checkpoint."
)


class GateRACLI(LightningCLI):
    """GateRAModule with any of the data modules, every setting checked before a weight is loaded."""

    def __init__(self, args: ArgsType) -> None:
        super().__init__(
            GateRAModule,
            SupervisedDataModule,
            subclass_mode_data=True,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # model.optimizer is the one place
            trainer_defaults={
                "precision": "32-true",
                "use_distributed_sampler": False,
                "callbacks": [RunSummary(), TensorBoardOverview()],
            },
            parser_kwargs={
                "prog": PROG,
                "description": "GateRA and its relatives on frozen language models.",
                "epilog": OWN_VERBS,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has, each with its own section."""
        for section, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, section)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.set_defaults(verbose=False)  # EvaluationReport prints the table
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then report every semantic problem at once; also before ``--print_config``, which exits inside."""
        assert isinstance(args, list)
        settings_only = [arg for arg in args if not arg.startswith("--print_config")]
        config = parser.parse_args(settings_only)
        raise_problems(parser, config)
        self.config = config if settings_only == args else parser.parse_args(args)
        if config.get(
            f"{config.subcommand}.ckpt_path"
        ):  # the one case in which a run's folder is written again
            self.save_config_kwargs["overwrite"] = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer, or what keeps this machine from having one."""
        refuse_without_srun()
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            hint = " To run on a CPU, add --config overlays/cpu.yaml" if "gpu" in str(error).lower() else ""
            raise ConfigError(f"trainer: {error}{hint}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}", on_every_process=True) from error
        refuse_other_number(trainer)
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if started_by_slurm():  # its own requeueing saves inside the signal handler; SafePreempt does not
            given = config.get("plugins") or []
            try:
                slurm = SLURMEnvironment(auto_requeue=False)
            except RuntimeError as error:  # --ntasks without --ntasks-per-node
                raise ValueError(error) from error
            config["plugins"] = [*(given if isinstance(given, list) else [given]), slurm]
        own = config.get("callbacks") or []
        if config.get("enable_progress_bar") is False:
            disable_library_bars()
        elif not any(
            isinstance(callback, ProgressBar) for callback in (own if isinstance(own, list) else [own])
        ):
            callbacks = [*callbacks, StepProgressBar()]
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        path = kwargs.get("ckpt_path")
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if path == "last":
            checkpoint = next(callback for callback in callbacks if isinstance(callback, AdapterCheckpoint))
            folder = Path(
                checkpoint.dirpath
                or Path(self.trainer.log_dir or self.trainer.default_root_dir) / "checkpoints"
            )
            checkpoint.dirpath = str(folder)  # some loggers would have it elsewhere than where this looks
            kwargs["ckpt_path"] = newest_sound_checkpoint(folder)
            if kwargs["ckpt_path"] is None and subcommand != "fit":
                raise ConfigError(
                    f"ckpt_path: 'last', and {folder} holds no checkpoint; accepted: a checkpoint, a folder of checkpoints, or "
                    "null with model.warm_start"
                )
            if kwargs["ckpt_path"] is None:
                log.info("no checkpoint in %s yet: the run begins", folder)
        elif path is not None and holds_checkpoints(path):
            kwargs["ckpt_path"] = newest_sound_checkpoint(Path(path))
        for callback in callbacks:
            if isinstance(callback, SafePreempt) and path != "last":
                callback.requeue = False  # the job would begin anew, each time
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            end_started_processes(self.trainer)
            raise

    def after_instantiate_classes(self) -> None:
        """Check the adapter against the model's modules, without its weights; the data speaks the backbone's tokens."""
        skeleton = load_skeleton(self.model.backbone)
        if skeleton is not None:
            find_targets(skeleton, self.model.adapter)
        self.datamodule.connect(load_tokenizer(self.model.backbone))


class RecipeCLI(GateRACLI):
    """The settings and the data of ``fit``, for verbs that only look at them: no trainer is built, and nothing runs."""

    model: Any
    datamodule: SupervisedDataModule

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse only: which problems matter is the verb's to say."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build the data and the settings of the model; a strategy or a logger may need what this machine lacks."""
        config = self.config.clone()
        for section in ("trainer", *CALLBACKS):
            config.fit.pop(section)
        settings = self.parser.instantiate_classes(config).fit
        self.model, self.datamodule = settings.model, settings.data

    def after_instantiate_classes(self) -> None:
        """Nothing: the tokenizer is the verb's to ask for."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def end_started_processes(trainer: Trainer, seconds: float = 10) -> None:
    """Let the processes that Lightning started in this one's name end, and see to it: one that waits for this one never would.

    Lightning's observer kills this process when it sees one of them end first, as it does with an error that all raise.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        started = list(launcher.procs)
        launcher.procs.clear()  # the observer's list
        for process in started:
            try:
                process.wait(timeout=seconds)
            except TimeoutExpired:
                process.kill()


def raise_problems(parser: LightningArgumentParser, config: Namespace) -> None:
    """Raise ConfigError with all semantic problems of a parsed config. Builds objects, but loads nothing."""
    problems = []
    config = config.clone()
    monitored = {}
    for section, callback in CALLBACKS.items():
        try:
            built = callback(**config[config.subcommand].pop(section).as_dict())
            monitored[section] = str(getattr(built, "monitor", None))
        except (ValueError, MisconfigurationException) as error:
            problems.append(str(error))
    settings = parser.instantiate_classes(config)[config.subcommand]
    problems += settings.model.problems() + settings.data.problems(config.subcommand)
    for section, name in monitored.items():
        if name not in ("None", "val/loss", *ACCURACIES):
            problems.append(
                f"{section}.monitor: {name!r} is never logged; accepted: val/loss, {', '.join(ACCURACIES)}"
            )
        elif name in ACCURACIES and not settings.data.rank_validation:
            problems.append(
                f"{section}.monitor: {name} is only known with data.rank_validation: true; accepted: that, or val/loss"
            )
    trainer = settings.trainer
    if str(trainer.precision) not in ("32-true", "32", "None"):
        problems.append(
            f"trainer.precision: {trainer.precision!r} would cast the adapter's masters; accepted: 32-true. "
            "The backbone's dtype is model.backbone.dtype"
        )
    if isinstance(trainer.val_check_interval, str | dict | timedelta):
        problems.append(TIMED_VALIDATION)
    if trainer.use_distributed_sampler:
        problems.append("trainer.use_distributed_sampler: true would cut up planned steps; accepted: false")
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.startswith("fsdp") or isinstance(strategy, FSDPStrategy):
        problems.append(
            f"trainer.strategy: {name!r} is FSDP1, which cannot clip by norm and charges gradient memory for "
            "frozen weights; accepted: auto, ddp, or --config overlays/fsdp.yaml (FSDP2)"
        )
    elif isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, AdapterShardingStrategy):
        problems.append(
            f"trainer.strategy: {name!r} does not know what to shard; "
            "accepted: auto, ddp, or --config overlays/fsdp.yaml (FSDP2)"
        )
    checkpoint = settings.get("ckpt_path")
    accepted = "a checkpoint, a folder of checkpoints, last (of this run's folder), or null"
    if checkpoint not in (None, "last") and not os.path.exists(checkpoint):
        problems.append(f"ckpt_path: {checkpoint!r} does not exist; accepted: {accepted}")
    elif (
        checkpoint is not None
        and os.path.isdir(checkpoint)
        and not (sharded(checkpoint) or holds_checkpoints(checkpoint))
    ):
        problems.append(
            f"ckpt_path: the folder {checkpoint!r} holds no checkpoint (*.ckpt); accepted: {accepted}"
        )
    if isinstance(strategy, AdapterShardingStrategy) and str(trainer.devices).isdecimal():  # a flag is text
        problems += strategy.problems(trainer.num_nodes * int(trainer.devices))
    if problems:
        raise ConfigError(problems)


def holds_checkpoints(path: str) -> bool:
    """Whether a path is a folder with checkpoints in it."""
    return any(Path(path).glob("*.ckpt"))


def sharded(path: str) -> bool:
    """Whether a folder is itself a checkpoint, by its name."""
    return Path(path).suffix == ".ckpt"


def find_config(name: str) -> str:
    """The path of a config: the file itself, or a shipped one by its name. Raises ConfigError listing those."""
    if os.path.isfile(name):
        return name
    shipped = Path(str(resources.files("gatera_lightning.cli_configs")))
    for candidate in (shipped / name, shipped / "overlays" / name):
        if candidate.is_file():
            return str(candidate)
    listed = ", ".join(sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*.yaml")))
    raise ConfigError(f"--config: {name!r} is neither a file nor a shipped config; shipped: {listed}")


def with_found_configs(argv: Sequence[str]) -> list[str]:
    """``argv`` with every ``--config NAME``, ``--config=NAME`` or ``-c NAME`` looked up and put before the other flags.

    Flags win over configs wherever they stand; jsonargparse lets whatever comes last win.
    """
    verb = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv))
    configs, others = [], []
    rest = iter(argv[len(verb) :])
    for arg in rest:
        if arg in ("--config", "-c"):
            configs += ["--config", find_config(next(rest, ""))]
        elif arg.startswith("--config="):
            configs += ["--config", find_config(arg.removeprefix("--config="))]
        else:
            others.append(arg)
    return [*verb, *configs, *others]
