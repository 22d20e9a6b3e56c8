"""Checks of trainer settings under which training would silently compute something else.

The command line applies them to parsed settings, before it builds a Trainer; GateRAModule applies them to the
Trainer it runs in. Each check returns messages that name the setting, its value and what is accepted; an
empty list means no problem.
"""

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.compatibility.lightning_internals import uses_distributed_sampler, validates_by_time
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.training.number_checks import STAGE_LIMITS, number_problems

_CHECKED_NUMBERS = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
)
"""Numbers that change the loss or the step; the command line checks all of them."""

_TIMED_VALIDATION = (
    "trainer.val_check_interval: a time, which elapses at a different step on every rank and in a resumed "
    "run; accepted: a number of micro-batches, or a fraction of an epoch"
)


def check_trainer(
    trainer: L.Trainer,
    stage: str,
    decoding: DecodingConfig,
    backbone: BackboneConfig,
    adapter: AdapterConfig,
) -> None:
    """Raise ConfigError with all problems of the Trainer that runs the module.

    Args:
        trainer: The Trainer.
        stage: What it runs: fit, validate, test or predict.
        decoding: The module's decoding settings.
        backbone: The module's settings of its backbone.
        adapter: The module's settings of its adapter.
    """
    problems = precision_problems(trainer.precision)
    if stage == "fit" and validates_by_time(trainer):
        problems.append(_TIMED_VALIDATION)
    if trainer.world_size > 1:  # one rank has the whole schedule, and Lightning leaves it as it is
        problems += sampler_problems(uses_distributed_sampler(trainer))
    problems += sharded_decoding_problems(trainer.strategy, decoding)
    problems += sharded_quantization_problems(trainer.strategy, backbone)
    problems += sharded_masks_problems(trainer.strategy, adapter)
    problems += strategy_problems(trainer.strategy)
    names = (*_CHECKED_NUMBERS, STAGE_LIMITS[stage])
    problems += number_problems({name: getattr(trainer, name, None) for name in names}, stage)
    if problems:
        raise ConfigError(problems)


def prepare_trainer(trainer: L.Trainer) -> None:
    """Let a Trainer write checkpoints atomically, and evaluate sharded weights outside inference mode."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if isinstance(trainer.strategy, AdapterShardingStrategy):
        # FSDP2 keeps the buffers that it gathers into. Created in inference mode, they could not be trained
        # through later, and a single shard could not be gathered at all.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False


def precision_problems(precision: Any) -> list[str]:
    """Reject every precision that casts the adapter's parameters.

    Args:
        precision: ``trainer.precision``; None means Lightning's default, which is 32-true.
    """
    if str(precision) in ("32-true", "32", "None"):
        return []
    return [
        f"trainer.precision: {str(precision)!r} would cast the adapter's fp32 parameters; accepted: 32-true. "
        "The dtype of the frozen weights is model.backbone.dtype"
    ]


def validation_interval_problems(interval: Any) -> list[str]:
    """Reject validation at time intervals.

    Args:
        interval: ``trainer.val_check_interval``; a str, dict or timedelta is a time.
    """
    return [_TIMED_VALIDATION] if isinstance(interval, str | dict | timedelta) else []


def sampler_problems(use_distributed_sampler: bool) -> list[str]:
    """Reject Lightning's distributed sampler: the data module already divides the data among ranks."""
    if not use_distributed_sampler:
        return []
    return ["trainer.use_distributed_sampler: true would shard the data twice; accepted: false"]


def strategy_problems(strategy: Any) -> list[str]:
    """Reject sharding strategies other than :class:`AdapterShardingStrategy`.

    Args:
        strategy: ``trainer.strategy``, a name or an instance.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    accepted = "accepted: auto, ddp, or --config overlays/fsdp.yaml (FSDP2, AdapterShardingStrategy)"
    if name.startswith("fsdp") or isinstance(strategy, FSDPStrategy):
        return [
            f"trainer.strategy: {name!r} is FSDP1, which cannot clip by norm and reserves gradient memory "
            f"for frozen weights; {accepted}"
        ]
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, AdapterShardingStrategy):
        return [f"trainer.strategy: {name!r} does not know which layers to shard; {accepted}"]
    return []


def sharded_decoding_problems(strategy: Any, decoding: DecodingConfig) -> list[str]:
    """Reject gate thresholds in decoding with sharded weights, which cannot be merged."""
    if not (isinstance(strategy, AdapterShardingStrategy) and decoding.uses_gate_thresholds):
        return []
    return [
        f"model.decoding.skip_below: {decoding.skip_below}, merge_above: {decoding.merge_above}, with "
        "sharded weights, which cannot be merged; accepted: 0 and 1, or trainer.strategy auto or ddp"
    ]


def sharded_quantization_problems(strategy: Any, backbone: BackboneConfig) -> list[str]:
    """Reject quantized weights with sharding: their codes and scales cannot be split along one dimension."""
    if not isinstance(strategy, AdapterShardingStrategy) or backbone.quantization == "none":
        return []
    return [
        f"model.backbone.quantization: {backbone.quantization!r}, with AdapterShardingStrategy, which cannot "
        "shard quantized weights; accepted: none, or trainer.strategy auto or ddp"
    ]


def sharded_masks_problems(strategy: Any, adapter: AdapterConfig) -> list[str]:
    """Reject mask embeddings with sharding: the sampler head runs outside of the sharded model's forward."""
    masks = getattr(adapter.gate, "mask_embeddings", 0)  # the gate may be an unknown name
    if not isinstance(strategy, AdapterShardingStrategy) or not masks:
        return []
    return [
        f"model.adapter.gate.mask_embeddings: {masks}, with AdapterShardingStrategy, which shards the layers "
        "of a model and no sampler head; accepted: 0, or trainer.strategy auto or ddp"
    ]
