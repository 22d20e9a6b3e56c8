"""Lightning's subcommands `fit`, `validate`, `test` and `predict` with this package's model and data.

Several `--config` are merged: later ones win, and flags win over all of them.
"""

import logging
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from typing_extensions import override

from gatera_lightning.adapters.targets import find_targets
from gatera_lightning.backbone.loading import load_skeleton, load_tokenizer
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.progress_bar import StepProgressBar, disable_library_bars
from gatera_lightning.callbacks.safe_preempt import SafePreempt
from gatera_lightning.checkpointing.contents import read_contents
from gatera_lightning.checkpointing.integrity import newest_valid_checkpoint
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.cli.commands import SUMMARIES
from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS, default_trainer_callbacks, drafted_answers
from gatera_lightning.cli.run_folder import RunFolder
from gatera_lightning.cli.settings_syntax import SettingsParser, describe_choices
from gatera_lightning.cli.shipped_configs import with_found_configs
from gatera_lightning.cli.trusted_code import trust_problems
from gatera_lightning.cli.validation import holds_checkpoints, validate_config
from gatera_lightning.compatibility.lightning_internals import release_started_processes, resume_only_if_asked
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.distributed.launch import check_rank_count, check_started_by_srun, started_by_slurm
from gatera_lightning.errors import ConfigError
from gatera_lightning.generation.drafting import DraftConfig
from gatera_lightning.training.checkpoint_contents import check_contents
from gatera_lightning.training.module import GateRAModule
from gatera_lightning.training.resume_rules import check_resume

log = logging.getLogger(__name__)


class GateRACLI(LightningCLI):
    """Runs GateRAModule with any of the data modules; checks every setting before it loads a weight."""

    def __init__(self, args: list[str]) -> None:
        """Parse a command line and run it.

        Args:
            args: The subcommand and its flags; configs are given by path or by the name of a shipped one.

        Raises:
            ConfigError: Something in the configuration cannot work.
        """
        try:
            super().__init__(
                GateRAModule,
                SupervisedDataModule,
                subclass_mode_data=True,
                save_config_callback=RunFolder,
                args=with_found_configs(args),
                parser_class=SettingsParser,
                seed_everything_default=0,
                auto_configure_optimizers=False,  # model.optimizer is the only place for its settings
                trainer_defaults={
                    "precision": "32-true",
                    "use_distributed_sampler": False,
                    "callbacks": default_trainer_callbacks(),
                },
                parser_kwargs={
                    "prog": PROGRAM,
                    "description": "Fine-tune and evaluate GateRA, HiRA, DoRA and LoRA on frozen models.",
                    "epilog": "Other subcommands, each with a --help of its own: "
                    + "; ".join(f"{name}: {summary}" for name, summary in SUMMARIES.items())
                    + ". --version prints the version.",
                },
            )
        except BaseException:
            if hasattr(self, "trainer"):
                end_started_ranks(self.trainer)
            raise

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a section for each callback that every run has."""
        for section, callback in RUN_CALLBACKS.items():
            parser.add_lightning_class_args(callback, section)
        parser.add_argument(
            "--draft",
            type=str | None,
            default=None,
            help="For test and predict: an adapter that drafts tokens, which the model verifies. The answers "
            f"are the same, in fewer forward passes: {ACCEPTED}.",
        )
        parser.add_argument(
            "--draft_block",
            type=int | None,
            default=None,
            help=f"Tokens per block with draft; null: {DraftConfig.block}.",
        )
        describe_choices(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and report every semantic problem at once, before `--print_config` prints and exits.

        Raises:
            ConfigError: Something in the configuration cannot work.
        """
        parser.set_defaults({"test.verbose": False})  # EvaluationReport prints the table
        settings_only = [arg for arg in args if not arg.startswith("--print_config")]
        config = parser.parse_args(settings_only)
        if problems := trust_problems(config[config.subcommand], args):
            raise ConfigError(problems)
        find_adapter(config[config.subcommand])
        validate_config(parser, config)
        self.config = config if settings_only == args else parser.parse_args(args)
        # Only a resumed run may write into its folder again.
        if config.subcommand == "fit" and config.fit.ckpt_path:
            self.save_config_kwargs["overwrite"] = True

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would replace flags and configs by the settings in a checkpoint file."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, with a progress bar and SLURM's environment where they are needed.

        Raises:
            ConfigError: The launcher or this machine does not fit the trainer's settings.
        """
        check_started_by_srun()
        settings = self.config_init[self.subcommand].trainer
        if settings.enable_progress_bar is False:
            disable_library_bars()
        elif not any(isinstance(callback, ProgressBar) for callback in _as_list(settings.callbacks)):
            self.trainer_defaults["callbacks"] = [StepProgressBar(), *default_trainer_callbacks()]
        if started_by_slurm():
            kwargs["plugins"] = [*_as_list(settings.plugins), _slurm_environment()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            hint = " To run on a CPU, add --config overlays/cpu.yaml" if "gpu" in str(error).lower() else ""
            raise ConfigError(f"trainer: {error}{hint}") from error
        except (TypeError, ValueError) as error:
            raise _trainer_error(error) from error
        settings = self.config_init[self.subcommand]
        if (drafts := drafted_answers(settings.draft, settings.draft_block)) is not None:
            trainer.callbacks.append(drafts)  # type: ignore[attr-defined]
        check_rank_count(trainer)
        resume_only_if_asked(trainer)
        return trainer

    @override
    def after_instantiate_classes(self) -> None:
        """Check the adapter against the model's modules, without weights, and connect data and tokenizer."""
        skeleton = load_skeleton(self.model.backbone)
        if skeleton is not None:
            find_targets(skeleton, self.model.adapter)
        self.datamodule.connect(load_tokenizer(self.model.backbone))
        self._resolve_checkpoint()
        self._check_checkpoint()

    def _resolve_checkpoint(self) -> None:
        """Replace a `ckpt_path` that is a folder or `last` by the newest valid checkpoint."""
        settings = self.config_init[self.subcommand]
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        path = settings.ckpt_path
        if path == "last":
            checkpoint = next(callback for callback in callbacks if isinstance(callback, AdapterCheckpoint))
            checkpoint.keep_in(Path(self.trainer.log_dir or self.trainer.default_root_dir))
            folder = Path(str(checkpoint.dirpath))
            settings.ckpt_path = newest_valid_checkpoint(folder)
            if settings.ckpt_path is None and self.subcommand != "fit":
                raise ConfigError(
                    f"ckpt_path: 'last', and {folder} holds no checkpoint; "
                    "accepted: a checkpoint, a folder of checkpoints, or null with model.warm_start"
                )
            if settings.ckpt_path is None:
                log.info("no checkpoint in %s yet: the run starts from the beginning", folder)
        elif path is not None and holds_checkpoints(path):
            settings.ckpt_path = newest_valid_checkpoint(Path(path))
        for callback in callbacks:
            if isinstance(callback, SafePreempt) and path != "last":
                callback.disable_requeue()  # a requeued job would start from the beginning every time

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that cannot be used before any weight is loaded."""
        path = self.config_init[self.subcommand].ckpt_path
        if path is not None and self.subcommand is not None:
            contents = read_contents(Path(path))
            check_contents(contents, path, resumes=self.subcommand == "fit")
            check_resume(contents, self.model, self.trainer, self.datamodule, stage=self.subcommand)
            if self.subcommand == "fit":
                self.model.expect_checkpoint(contents)


def find_adapter(settings: Namespace) -> None:
    """Replace run folders and ids on the hub by adapter folders: `warm_start`, `backbone.adapter`, `draft`.

    Args:
        settings: The parsed settings of a subcommand; changed in place.

    Raises:
        ConfigError: It is empty, there are several adapters, or the hub's cannot be fetched.
    """
    model = settings.model
    if model.warm_start is not None:
        model.warm_start = adapter_folder(model.warm_start, "model.warm_start")
    if model.backbone.adapter is not None:
        model.backbone.adapter = adapter_folder(model.backbone.adapter, "model.backbone.adapter")
    if settings.draft is not None:
        settings.draft = adapter_folder(settings.draft, "draft")


def end_started_ranks(trainer: Trainer, seconds: float = 10) -> None:
    """Wait for the ranks that Lightning started from this process to end, and kill those that do not.

    A rank that waits for this process in a collective would never end. Lightning's observer thread kills this
    process when another rank ends first, which happens whenever all ranks raise the same error.

    Args:
        trainer: The Trainer that started them.
        seconds: How long to wait for each.
    """
    for process in release_started_processes(trainer):
        try:
            process.wait(timeout=seconds)
        except TimeoutExpired:
            process.kill()


def _slurm_environment() -> SLURMEnvironment:
    """SLURM's environment without Lightning's own requeueing, which saves inside the signal handler."""
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:  # --ntasks without --ntasks-per-node
        raise _trainer_error(error) from error


def _trainer_error(error: Exception) -> ConfigError:
    return ConfigError(f"trainer: {' '.join(str(error).split())}", on_every_rank=True)


def _as_list(value: Any) -> list[Any]:
    """A list of a setting that may be null, one object or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
