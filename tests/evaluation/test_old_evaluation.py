"""An evaluation folder written by version 0.1, before the modules moved, against one of the current version.

The old folder holds six examples, evaluated by likelihood and by generation with the tiny backbone and a
perturbed adapter (``evaluations.perturbed_module``), as written by commit 8039eb7.
"""

import json
import shutil
from pathlib import Path

import pytest
from evaluations import BOTH, evaluate, perturbed_module

from gatera_lightning import save_adapter
from gatera_lightning.cli.commands.compare import compare
from gatera_lightning.evaluation.recorded_run import read_run
from gatera_lightning.evaluation.run_labels import run_labels

OLD = Path(__file__).parent / "data" / "evaluation_0_1"
PER_MACHINE = {"backbone"}  # the tiny backbone's random weights may round differently on another processor


@pytest.fixture(scope="module")
def new(tiny_backbone, tmp_path_factory):
    """The folder of the same evaluation by the current version."""
    root = tmp_path_factory.mktemp("evaluations")
    module = perturbed_module(tiny_backbone)
    module.warm_start = str(save_adapter(module.model, root / "adapter"))
    evaluate(module, root / "new", examples=6)
    return root / "new"


def load(folder, name):
    return json.loads((folder / name).read_text())


def missing_keys(old, current, path=""):
    """Paths of the keys of ``old`` and of the objects in it that ``current`` does not have."""
    if not isinstance(old, dict):
        return []
    found = [f"{path}{key}" for key in old if key not in current]
    return found + [
        name
        for key in old
        if key in current
        for name in missing_keys(old[key], current[key], f"{path}{key}.")
    ]


def test_identity_equals_old_one(new):
    old, current = load(OLD, "evaluation.json"), load(new, "evaluation.json")
    assert list(current) == list(old)
    assert {name for name in old if current[name] != old[name]} <= PER_MACHINE


def test_predictions_equal_old_ones(new):
    lines = [(folder / "predictions.jsonl").read_text().splitlines() for folder in (OLD, new)]
    for before, after in zip(*(map(json.loads, found) for found in lines), strict=True):
        log_likelihoods = before["likelihood"].pop("log_likelihoods")
        assert after["likelihood"].pop("log_likelihoods") == pytest.approx(log_likelihoods, rel=1e-4)
        assert after == before


def test_summary_has_keys_and_figures_of_old_one(new):
    old, current = load(OLD, "test_results.json"), load(new, "test_results.json")
    assert list(current) == list(old)
    assert missing_keys(old, current) == []
    for name in ("rows", "rows_of_split", "average", "tasks", "text", "text_skipped"):
        assert current[name] == old[name]
    assert current["nats_per_target_token"] == pytest.approx(old["nats_per_target_token"], rel=1e-4)


@pytest.mark.parametrize("baseline", ["old", "new"])
def test_compare_accepts_old_folder(new, tmp_path, capsys, baseline):
    folders = [OLD, new] if baseline == "old" else [new, OLD]
    compare([*map(str, folders), "--out", str(tmp_path / "comparison.json")])
    (pair,) = load(tmp_path, "comparison.json")["pairs"]
    assert (pair["common"], pair["only_baseline"], pair["only_run"], pair["retokenized"]) == (6, 0, 0, 0)
    assert set(pair["evaluated_otherwise"]) <= PER_MACHINE
    assert {found["value"] for found in pair["accuracy"]} == {0.0}
    assert pair["nats_per_token"]["value"] == pytest.approx(0, abs=1e-3)
    assert "6 examples in common" in capsys.readouterr().out


def test_method_of_old_folder_is_read(new):
    old = read_run(OLD)
    assert old.method == read_run(new).method == "hira × token"
    assert run_labels([old, read_run(new)]) == ["hira × token (evaluation_0_1)", "hira × token (new)"]


def test_evaluation_resumes_in_old_folder(new, tiny_backbone, tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "folder")
    identity = load(folder, "evaluation.json") | {
        name: load(new, "evaluation.json")[name] for name in PER_MACHINE
    }
    (folder / "evaluation.json").write_text(json.dumps(identity))
    before = (folder / "predictions.jsonl").read_bytes()
    assert evaluate(perturbed_module(tiny_backbone), folder, examples=6, evaluate_by=BOTH).computed == []
    assert (folder / "predictions.jsonl").read_bytes() == before
