"""Checks a parsed config for everything that cannot work, before any weight is loaded."""

import os
from pathlib import Path
from typing import get_args

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from gatera_lightning.checkpointing.integrity import CHECKPOINT_FOLDER
from gatera_lightning.cli.class_building import build_classes
from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS, drafted_answers
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.likelihood_ranking import Score
from gatera_lightning.training.callback_checks import callback_problems
from gatera_lightning.training.logger_checks import logger_problems
from gatera_lightning.training.module import GateRAModule
from gatera_lightning.training.number_checks import (
    device_problems,
    number_problems,
    seed_problems,
    time_problems,
)
from gatera_lightning.training.trainer_checks import (
    precision_problems,
    sampler_problems,
    sharded_decoding_problems,
    sharded_masks_problems,
    sharded_quantization_problems,
    strategy_problems,
    validation_interval_problems,
)
from gatera_lightning.training.trainer_names import name_problems

VALIDATION_ACCURACIES = tuple(f"val/accuracy_{score}" for score in get_args(Score))
"""Logged by the validation if `data.rank_validation` is true."""

_CHECKPOINTS = "a checkpoint, a folder of checkpoints, last (in this run's folder), or null"


def validate_config(parser: LightningArgumentParser, config: Namespace) -> None:
    """Raise one error with all semantic problems of a parsed config.

    Builds the configured objects, but neither a Trainer nor a model, and reads no weights.

    Args:
        parser: The parser that parsed the config.
        config: The whole config, with the settings of its subcommand in a section of that name.

    Raises:
        ConfigError: Something cannot work.
    """
    config = config.clone()
    problems, monitored = _build_callbacks(config[config.subcommand])
    if unusable := logger_problems(config[config.subcommand].trainer.logger):
        raise ConfigError(problems + unusable)  # they could not be built
    settings = build_classes(parser, config)[config.subcommand]
    problems += settings.model.problems() + settings.data.problems(config.subcommand)
    problems += _monitor_problems(monitored, settings.data)
    problems += seed_problems(settings.get("seed_everything"))
    problems += _trainer_problems(settings.trainer, settings.model, config.subcommand)
    problems += _checkpoint_problems(settings.get("ckpt_path"))
    problems += _draft_problems(settings, config.subcommand)
    if problems:
        raise ConfigError(problems)


def holds_checkpoints(path: str) -> bool:
    """Return whether a path is a folder with checkpoints in it."""
    return any(Path(path).glob("*.ckpt"))


def _build_callbacks(settings: Namespace) -> tuple[list[str], dict[str, str]]:
    """Remove the callbacks' sections; their problems, and the metric that each callback monitors."""
    problems, monitored = [], {}
    for section, callback in RUN_CALLBACKS.items():
        try:
            built = callback(**settings.pop(section).as_dict())
            monitored[section] = str(getattr(built, "monitor", None))
        except (ValueError, MisconfigurationException) as error:
            problems.append(str(error))
    return problems, monitored


def _monitor_problems(monitored: dict[str, str], data: SupervisedDataModule) -> list[str]:
    problems = []
    for section, name in monitored.items():
        if name not in ("None", "val/loss", *VALIDATION_ACCURACIES):
            accepted = ", ".join(("val/loss", *VALIDATION_ACCURACIES))
            problems.append(f"{section}.monitor: {name!r} is never logged; accepted: {accepted}")
        elif name in VALIDATION_ACCURACIES and not data.rank_validation:
            problems.append(
                f"{section}.monitor: {name} is logged only with data.rank_validation: true; "
                "accepted: that setting, or val/loss"
            )
    return problems


def _checkpoint_problems(path: str | None) -> list[str]:
    if path in (None, "last"):
        return []
    if not os.path.exists(path):
        return [f"ckpt_path: {path!r} does not exist; accepted: {_CHECKPOINTS}"]
    is_sharded_checkpoint = Path(path).suffix == ".ckpt"
    if os.path.isdir(path) and not is_sharded_checkpoint and not holds_checkpoints(path):
        inside = Path(path) / CHECKPOINT_FOLDER
        hint = f"; did you mean {str(inside)!r}?" if holds_checkpoints(str(inside)) else ""
        return [
            f"ckpt_path: the folder {path!r} holds no checkpoint (*.ckpt); accepted: {_CHECKPOINTS}{hint}"
        ]
    return []


def _draft_problems(settings: Namespace, stage: str) -> list[str]:
    drafts = drafted_answers(settings.draft, settings.draft_block)
    if drafts is not None:
        return drafts.problems(stage, settings.model, settings.data, settings.trainer.strategy)
    if settings.draft_block is not None:
        return [f"draft_block: {settings.draft_block}, without drafts; accepted: null, or with draft"]
    return []


def _trainer_problems(trainer: Namespace, module: GateRAModule, stage: str) -> list[str]:
    problems = name_problems(trainer)
    problems += precision_problems(trainer.precision)
    problems += number_problems(vars(trainer), stage)
    problems += time_problems(trainer.max_time) if stage == "fit" else []
    problems += device_problems(trainer.devices)
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    problems += callback_problems(callbacks)
    problems += validation_interval_problems(trainer.val_check_interval)
    problems += sampler_problems(trainer.use_distributed_sampler)
    problems += strategy_problems(trainer.strategy)
    problems += sharded_decoding_problems(trainer.strategy, module.decoding)
    problems += sharded_quantization_problems(trainer.strategy, module.backbone)
    problems += sharded_masks_problems(trainer.strategy, module.adapter)
    # Only devices that are a number tell the number of ranks before the run; the value of a flag is text.
    if isinstance(trainer.strategy, AdapterShardingStrategy) and str(trainer.devices).isdecimal():
        problems += trainer.strategy.problems(trainer.num_nodes * int(trainer.devices))
    return problems
