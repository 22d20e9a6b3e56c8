"""Trainer settings that are rejected, from parsed settings and from a built Trainer."""

from datetime import timedelta

import lightning as L
import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from tiny_backbone import tiny_module, tiny_trainer

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.training.trainer_checks import (
    check_trainer,
    precision_problems,
    sampler_problems,
    sharded_decoding_problems,
    sharded_quantization_problems,
    strategy_problems,
    validation_interval_problems,
)

MASKED = AdapterConfig(update="lora", gate=PositionGateConfig(mask_embeddings=2))


@pytest.mark.parametrize("precision", ["32-true", "32", 32, None])
def test_full_precision_is_accepted(precision):
    assert precision_problems(precision) == []


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", 16, "64-true"])
def test_other_precisions_are_rejected(precision):
    (problem,) = precision_problems(precision)
    assert problem.startswith(f"trainer.precision: '{precision}' would cast the adapter's fp32 parameters")


@pytest.mark.parametrize("interval", [1, 0.25, None])
def test_validation_by_steps_is_accepted(interval):
    assert validation_interval_problems(interval) == []


@pytest.mark.parametrize("interval", ["00:00:10:00", {"minutes": 10}, timedelta(minutes=10)])
def test_validation_by_time_is_rejected(interval):
    (problem,) = validation_interval_problems(interval)
    assert problem.startswith("trainer.val_check_interval: a time")


def test_distributed_sampler_is_rejected():
    assert sampler_problems(False) == []
    (problem,) = sampler_problems(True)
    assert problem.startswith("trainer.use_distributed_sampler: true")


@pytest.mark.parametrize(
    "strategy",
    ["auto", "ddp", DDPStrategy(), AdapterShardingStrategy()],
    ids=["auto", "ddp", "DDPStrategy", "AdapterShardingStrategy"],  # str() would hold an address
)
def test_strategies_that_work_are_accepted(strategy):
    assert strategy_problems(strategy) == []


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("fsdp", "fsdp"),
        ("fsdp_cpu_offload", "fsdp_cpu_offload"),
        (ModelParallelStrategy(), "ModelParallelStrategy"),
    ],
)
def test_other_sharding_strategies_are_rejected(strategy, name):
    (problem,) = strategy_problems(strategy)
    assert problem.startswith(f"trainer.strategy: '{name}'")
    assert problem.endswith(
        "accepted: auto, ddp, or --config overlays/fsdp.yaml (FSDP2, AdapterShardingStrategy)"
    )


def test_fsdp1_instance_is_rejected():
    (problem,) = strategy_problems(FSDPStrategy())
    assert problem.startswith("trainer.strategy: 'FSDPStrategy' is FSDP1")


def test_gate_thresholds_with_sharded_weights_are_rejected():
    decoding = DecodingConfig(skip_below=0.1)
    assert sharded_decoding_problems(AdapterShardingStrategy(), DecodingConfig()) == []
    assert sharded_decoding_problems("ddp", decoding) == []
    (problem,) = sharded_decoding_problems(AdapterShardingStrategy(), decoding)
    assert problem.startswith("model.decoding.skip_below: 0.1, merge_above: 1.0, with sharded weights")


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_check_trainer_reports_all_problems(tmp_path, stage):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=AdapterShardingStrategy(),
        precision="16-true",
        val_check_interval=timedelta(minutes=10),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ConfigError) as caught:
        check_trainer(trainer, stage, DecodingConfig(skip_below=0.1), BackboneConfig(id="here"), MASKED)
    names = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert names == [
        "trainer.precision",
        *(["trainer.val_check_interval"] if stage == "fit" else []),
        "trainer.use_distributed_sampler",
        "model.decoding.skip_below",
        "model.adapter.gate.mask_embeddings",
    ]


def test_one_rank_may_use_distributed_sampler(tmp_path):
    """Lightning's default, with which one rank reads the data as it is."""
    check_trainer(
        L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path),
        "fit",
        DecodingConfig(),
        BackboneConfig(id="here"),
        MASKED,
    )


def test_setup_prepares_trainer_for_sharded_weights(tiny_backbone, tmp_path):
    module = tiny_module(tiny_backbone)
    module.trainer = trainer = tiny_trainer(tmp_path, strategy=AdapterShardingStrategy())
    module.setup("test")
    assert not any(
        loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    )
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_sharding_of_quantized_weights_is_refused():
    backbone = BackboneConfig(id="here", quantization="int8")
    (problem,) = sharded_quantization_problems(AdapterShardingStrategy(), backbone)
    assert problem.startswith("model.backbone.quantization: 'int8', with AdapterShardingStrategy")
    assert not sharded_quantization_problems("ddp", backbone)
    assert not sharded_quantization_problems(AdapterShardingStrategy(), BackboneConfig(id="here"))
