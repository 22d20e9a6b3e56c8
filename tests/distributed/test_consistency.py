"""Ranks with different settings or examples end at once, and the message says what differs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from launched_ranks import SHARDED, TWO, assert_refused, free_port, torchrun_environment
from tiny_backbone import sample_rows, tiny_data, tiny_module, tiny_trainer

pytestmark = pytest.mark.slow


def test_fit_names_every_setting_that_differs(launch):
    settings = {
        "--model.optimizer.lr": ("0.01", "0.003"),
        "--trainer.accumulate_grad_batches": ("1", "2"),
        "--data.init_args.seed": ("0", "5"),
    }
    flags = ([part for name, values in settings.items() for part in (name, values[rank])] for rank in (0, 1))
    messages = [
        f"{name.removeprefix('--').replace('init_args.', '')}: rank 0 has {one}, rank 1 has {other}; "
        for name, (one, other) in settings.items()
    ]
    assert_refused(launch.two([], *flags), "3 problems in the configuration", *messages)


@pytest.mark.parametrize("strategy", [[], SHARDED], ids=["ddp", "fsdp"])
def test_fit_refuses_adapters_of_different_shapes(launch, strategy):
    ended = launch.two(strategy, ["--model.adapter.rank", "4"], ["--model.adapter.rank", "8"])
    message = "model.adapter.rank: rank 0 has 4, rank 1 has 8; accepted: the same on every rank"
    assert_refused(ended, message)


def test_fit_refuses_different_examples_under_the_same_name(launch, tmp_path):
    """As with a copy of the data on each node."""
    port = free_port()
    ranks = []
    for rank in (0, 1):
        folder = tmp_path / f"node-{rank}"
        folder.mkdir()
        (folder / "rows.json").write_text(json.dumps(sample_rows("train")[rank : rank + 16]))
        environment = torchrun_environment(rank, port) | {"ROWS": str(folder)}
        ranks.append(([*SHARDED, *TWO, "--data.init_args.train", '["$ROWS/rows.json"]'], environment))
    message = "rank 1 reads different training examples from rank 0; accepted: the same on every rank"
    assert_refused(launch(*ranks), "1 problem in the configuration", message)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("NextToken", ("GateEntropy", 0.2)), "model.objectives[1].weight: rank 0 has 0.1, rank 1 has 0.2"),
        (
            ("NextToken",),
            "rank 0 has ['NextToken', 'GateEntropy'], rank 1 has ['NextToken']",
        ),
        (
            (("GateEntropy", 0.1), "NextToken"),
            "rank 0 has ['NextToken', 'GateEntropy'], rank 1 has ['GateEntropy', 'NextToken']",
        ),
    ],
    ids=["weight", "fewer", "order"],
)
def test_fit_refuses_different_objectives(launch, others, message):
    first = objectives("NextToken", ("GateEntropy", 0.1))
    gate = ["--model.adapter.gate.entropy_weight", "0"]  # the objectives alone have weights
    assert_refused(launch.two(gate, first, objectives(*others)), message)


def objectives(*given):
    """The flag that selects objectives, each by name or by name and weight."""
    entries = []
    for entry in given:
        name, *weight = [entry] if isinstance(entry, str) else entry
        arguments = {"init_args": {"weight": weight[0]}} if weight else {}
        entries.append({"class_path": f"gatera_lightning.objectives.{name}", **arguments})
    return ["--model.objectives", json.dumps(entries)]


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


@pytest.mark.parametrize("second", ["other", "copy"])
def test_fit_refuses_different_checkpoints(checkpoints, tiny_backbone, tmp_path, second):
    """Under a Trainer of one's own, which tells its checkpoint only when it restores it."""
    one, other, copy = map(str, checkpoints)
    paths = {"other": other, "copy": copy}
    script = tmp_path / "script.py"
    script.write_text(
        RESUME.format(paths=[one, paths[second]], backbone=str(tiny_backbone), out=str(tmp_path))
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
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    if second == "copy":
        assert [output.split()[-1] for output, _ in outputs] == ["step-4", "step-4"], outputs
        return
    for output, error in outputs:
        assert f"ckpt_path: rank 0 has '{one}' (SHA-256 " in output, error
        assert f"), rank 1 has '{other}' (SHA-256 " in output
        assert "accepted: the same checkpoint on every rank" in output


RESUME = """
import os
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from gatera_lightning import ConfigError

trainer = tiny_trainer({out!r}, devices=2, strategy="ddp")
path = {paths}[int(os.environ["RANK"])]
try:
    trainer.fit(tiny_module({backbone!r}), datamodule=tiny_data({backbone!r}), ckpt_path=path)
    print(f"step-{{trainer.global_step}}", flush=True)
except ConfigError as error:
    print(error, flush=True)
    os._exit(2)
"""
