"""Ranks that do not read the same checkpoint end together, and one message says which has what."""

import os
import subprocess
import sys

import pytest
import torch
from launched_ranks import free_port, torchrun_environment
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoints(tiny_backbone, tmp_path):
    """Two checkpoints after the same step, whose moments differ, and a copy of the first."""
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    paths = [tmp_path / name for name in ("one.ckpt", "other.ckpt", "copy.ckpt")]
    trainer.save_checkpoint(paths[0])
    checkpoint = torch.load(paths[0], weights_only=True)
    torch.save(checkpoint, paths[2])
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] += 1
    torch.save(checkpoint, paths[1])
    return paths


MESSAGES = {
    "other": "ckpt_path: rank 0 has {one} (SHA-256 .*), rank 1 has {other} (SHA-256 .*); accepted: the same",
    "copy": None,
    "null": "ckpt_path: rank 0 has {one}, rank 1 has null; accepted: the same checkpoint on every rank, or",
    "missing": "{missing}: .*",
}


@pytest.mark.parametrize(
    ("second", "stage", "strategy"),
    [
        ("copy", "fit", "ddp"),
        ("null", "fit", "ddp"),
        ("null", "fit", "fsdp"),
        ("missing", "fit", "ddp"),
        ("other", "validate", "ddp"),
    ],
)
def test_ranks_with_different_checkpoints_end(checkpoints, tiny_backbone, tmp_path, second, stage, strategy):
    """Under a Trainer of one's own, which tells its checkpoint only when it reads it."""
    one, other, copy = map(str, checkpoints)
    missing = str(tmp_path / "missing.ckpt")
    paths = {"other": other, "copy": copy, "null": None, "missing": missing}
    script = tmp_path / "script.py"
    script.write_text(
        RUN.format(
            paths=[one, paths[second]],
            backbone=str(tiny_backbone),
            out=str(tmp_path),
            stage=stage,
            strategy=strategy,
        )
    )
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ
            | torchrun_environment(rank, port)
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if second == "copy":
        assert [output.split()[-1] for output, _ in outputs] == ["step-4", "step-4"], outputs
        return
    given = {"one": f"'{one}'", "other": f"'{other}'", "missing": missing}
    expected = [part.format(**given) for part in MESSAGES[second].split(".*")]
    for output, error in outputs:
        assert all(part in output for part in expected), (output, error)


RUN = """
import os
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from gatera_lightning import CheckpointError, ConfigError
from gatera_lightning.distributed.sharding import AdapterShardingStrategy

strategy = "ddp" if {strategy!r} == "ddp" else AdapterShardingStrategy()
trainer = tiny_trainer({out!r}, devices=2, strategy=strategy, limit_val_batches=1)
path = {paths}[int(os.environ["RANK"])]
data = tiny_data({backbone!r})
try:
    getattr(trainer, {stage!r})(tiny_module({backbone!r}), datamodule=data, ckpt_path=path)
    print(f"step-{{trainer.global_step}}", flush=True)
except (CheckpointError, ConfigError) as error:
    print(error, flush=True)
    os._exit(2)
"""
