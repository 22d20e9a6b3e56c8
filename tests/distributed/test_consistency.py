"""Ranks with different settings or examples end at once, and the message says what differs."""

import json

import pytest
from launched_ranks import SHARDED, TWO, assert_refused, free_port, torchrun_environment
from tiny_backbone import sample_rows

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
