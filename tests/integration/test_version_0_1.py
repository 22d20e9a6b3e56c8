"""What version 0.1 wrote loads, resumes and evaluates with the numbers that version 0.1 gave.

Version 0.1 wrote ``data/version_0_1``: a tiny backbone, a recipe with flat gate settings and old class paths,
a run of four steps on one rank and another on two sharded ranks, and an evaluation. ``expected.json`` holds
what version 0.1 computed when it resumed these runs.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gatera_lightning.adapters.peft_schema import from_peft_tensor
from gatera_lightning.cli.main import main

DATA = Path(__file__).parent / "data" / "version_0_1"
EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_backbone):
    """A copy of the old folder as the working folder; ``tiny_backbone`` sets the session's token cache."""
    copy = Path(shutil.copytree(DATA, tmp_path / "version_0_1"))
    monkeypatch.chdir(copy)
    return copy


def logged(run):
    """The values that a run logged, row by row."""
    with (Path(run) / "version_0" / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def assert_rows_match(rows, expected):
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)  # another CPU rounds differently


@pytest.mark.parametrize("config", ["recipe.yaml", "run/version_0/config.yaml"])
def test_old_config_trains_as_before(folder, config):
    assert main(["fit", "--config", config, "--trainer.logger.init_args.name", "again"]) == 0
    assert_rows_match(logged("again"), logged("run"))


def test_old_checkpoint_resumes_as_before(folder):
    settings = ["--config", "run/version_0/config.yaml", "--trainer.max_steps", "7"]
    last = "run/version_0/checkpoints/last.ckpt"
    assert main(["fit", *settings, "--trainer.logger.init_args.name", "resumed", "--ckpt_path", last]) == 0
    assert_rows_match(logged("resumed"), EXPECTED["resumed"])


def test_old_sharded_checkpoint_resumes_as_before(folder):
    settings = ["--config", "recipe.yaml", "--model.adapter.dropout", "0.0", "--trainer.max_steps", "7"]
    last = "sharded_run/version_0/checkpoints/last.ckpt"
    assert main(["fit", *settings, "--trainer.logger.init_args.name", "resumed", "--ckpt_path", last]) == 0
    assert_rows_match(logged("resumed"), EXPECTED["resumed_from_shards"])


def test_old_adapter_evaluates_as_before(folder):
    adapter = "run/version_0/checkpoints/last"
    args = ["--config", "recipe.yaml", "--model.warm_start", adapter, "--evaluation.folder", "new_results"]
    assert main(["test", *args]) == 0
    lines = Path("new_results/predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    for found, wanted in zip(predictions, EXPECTED["predictions"], strict=True):
        scores, old_scores = found["likelihood"], wanted["likelihood"]
        assert scores["log_likelihoods"] == pytest.approx(old_scores["log_likelihoods"], rel=1e-5)
        assert {**found, "likelihood": scores["choice"]} == {**wanted, "likelihood": old_scores["choice"]}
    loss = json.loads(Path("new_results/test_results.json").read_text())["nats_per_target_token"]
    assert loss == pytest.approx(EXPECTED["nats_per_target_token"], rel=1e-6)


def test_old_evaluation_compares_with_a_new_one(folder, capsys):
    adapter = "run/version_0/checkpoints/last"
    args = ["--config", "recipe.yaml", "--model.warm_start", adapter, "--evaluation.folder", "new_results"]
    assert main(["test", *args]) == 0
    assert main(["compare", "results", "new_results"]) == 0


def test_old_checkpoint_exports_the_same_adapter(folder):
    assert main(["export", "run/version_0/checkpoints/last.ckpt", "--out", "exported"]) == 0
    old = load_file(DATA / "run/version_0/checkpoints/last/adapter_model.safetensors")
    new = load_file("exported/adapter_model.safetensors")
    assert {from_peft_tensor(name) for name in new} == set(old)
    assert all(torch.equal(tensor, old[from_peft_tensor(name)]) for name, tensor in new.items())
