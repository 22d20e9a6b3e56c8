"""A recipe without its run: its settings and data, for subcommands that only look at them."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gatera_lightning.cli.class_building import build_classes
from gatera_lightning.cli.lightning_cli import GateRACLI, find_adapter
from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS
from gatera_lightning.cli.trusted_code import own_classes_only, trust_problems
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.errors import ConfigError


class RecipeCLI(GateRACLI):
    """Parses what `fit` parses and builds the model's settings and the data module; runs nothing."""

    model: Any
    datamodule: SupervisedDataModule

    accumulate: int
    """`trainer.accumulate_grad_batches`."""

    world_size: int
    """The number of ranks that would train."""

    world_size_remark: str
    """A remark for the user if only the machine that trains knows the number of ranks; else empty."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without checking: each subcommand checks the settings that matter to it.

        Raises:
            ConfigError: A config names code that only the user's own flags may name.
        """
        with own_classes_only(args):
            self.config = parser.parse_args(args)
        if problems := trust_problems(self.config.fit, args):
            raise ConfigError(problems)
        find_adapter(self.config.fit)

    @override
    def instantiate_classes(self) -> None:
        """Build model settings and data only: this machine may lack what a strategy or a logger needs."""
        trainer = self.config.fit.trainer
        self.accumulate = trainer.accumulate_grad_batches
        self.world_size, self.world_size_remark = planned_world_size(trainer.devices, trainer.num_nodes)
        config = self.config.clone()
        for section in ("trainer", *RUN_CALLBACKS):
            config.fit.pop(section)
        settings = build_classes(self.parser, config).fit
        self.model, self.datamodule = settings.model, settings.data

    @override
    def after_instantiate_classes(self) -> None:
        """Do nothing: a subcommand loads the tokenizer when it needs it."""

    def set_up_data(self, stage: str, world_size: int) -> None:
        """Set up the data module as rank 0 of a run does.

        Args:
            stage: fit or test.
            world_size: The run's number of ranks.
        """
        self.datamodule.trainer = _PlannedTrainer(world_size, self.accumulate)  # type: ignore[assignment]
        self.datamodule.setup(stage)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: there is no Trainer."""


def planned_world_size(devices: int | str | list[int], nodes: int) -> tuple[int, str]:
    """Count the ranks that a Trainer would train with.

    Args:
        devices: `trainer.devices`.
        nodes: `trainer.num_nodes`.

    Returns:
        The number of ranks, and a remark if only the machine that trains could know it.
    """
    if isinstance(devices, str) and "," in devices:  # Lightning reads "0,1" and "0," as lists of indices
        return len([device for device in devices.split(",") if device.strip()]) * nodes, ""
    if isinstance(devices, list):
        return len(devices) * nodes, ""
    if str(devices).isdecimal() and int(devices) > 0:  # a flag's value is text
        return int(devices) * nodes, ""
    return 1, f" (assumed: trainer.devices is {devices})"


@dataclass(frozen=True)
class _PlannedTrainer:
    """What a data module needs to know about a Trainer, for a run with ranks that do not exist here."""

    world_size: int
    accumulate_grad_batches: int
    limit_train_batches: float = 1.0
    global_rank: int = 0
    is_global_zero: bool = False  # the data module then logs nothing between the printed figures
