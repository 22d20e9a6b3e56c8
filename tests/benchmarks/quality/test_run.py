"""A run on a tiny model: every method trains, what is measured is right, and the same run repeats."""

import copy
import json
import math
from dataclasses import replace

import datasets
import pytest
import torch

from benchmarks.quality import run as run_module
from benchmarks.quality.evaluation import row_losses
from benchmarks.quality.families import MEASURED, FamilyRows, Rows
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import Run
from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.datamodules.batching.datasets import TokenTable


def _rows(count, candidates, seed):
    generator = torch.Generator().manual_seed(seed)

    def tokens(size):
        return torch.randint(3, 128, (size,), generator=generator).tolist()

    table = [
        {
            "prompt": tokens(3 + index % 5),
            "answers": [tokens(2 + (index + answer) % 3) for answer in range(candidates)],
            "characters": [4] * candidates,
            "gold": index % candidates,
            "example": index,
            "earlier_responses": [],
            "key": f"{seed}-{index}",
        }
        for index in range(count)
    ]
    return Rows(TokenTable(datasets.Dataset.from_list(table), 0, 2), tuple(reversed(range(count))))


@pytest.fixture
def tiny_run(tiny_llama, monkeypatch):
    """``execute`` with a tiny backbone, few rows and short training."""
    families = {
        name: replace(family, validation_rows=6, test_rows=8, retention_rows=4, probe_rows=2)
        for name, family in MEASURED.items()
    }
    families["commonsense"] = replace(families["commonsense"], batch_size=2)
    rows = {
        name: FamilyRows(
            *(_rows(count, 3 if family.has_candidates else 1, 10 * seed + count) for count in (24, 6, 8))
        )
        for seed, (name, family) in enumerate(families.items())
    }
    backbones = {name: tiny_llama(getattr(torch, name)) for name in ("float32", "bfloat16")}
    weights = {dtype: copy.deepcopy(backbone.state_dict()) for dtype, backbone in backbones.items()}
    methods = {name: replace(method, steps=8) for name, method in METHODS.items()}
    monkeypatch.setattr(run_module, "MEASURED", families)
    monkeypatch.setattr(run_module, "METHODS", methods)
    monkeypatch.setattr(run_module, "_backbone", backbones.__getitem__)
    monkeypatch.setattr(run_module, "_rows", rows.__getitem__)
    monkeypatch.setattr(run_module, "rows_digest", lambda family: "0")
    yield run_module.execute
    for dtype, backbone in backbones.items():
        assert all(torch.equal(w, weights[dtype][name]) for name, w in backbone.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_repeats(tiny_run, method):
    first, second = (tiny_run(Run("commonsense", "seeds", method, 0.02, 1)) for _ in range(2))
    untrained = tiny_run(Run("commonsense", "untrained", "untrained", None, 0))
    costs = first.pop("cost"), second.pop("cost")
    assert costs[0]["adapter_bytes"] == costs[1]["adapter_bytes"] > 0
    assert first == second
    assert first["test"]["sums"] != untrained["test"]["sums"]
    assert math.isfinite(first["train_loss"])
    assert [point["step"] for point in first["trajectory"]] == [2, 4, 8]
    assert (first["gates"] is None) == (METHODS[method].adapter().gate.kind == "none")
    assert first["retention"].keys() == {"math", "dialogue", "prose"}


def test_rates_stage_measures_validation_rows_only(tiny_run):
    line = tiny_run(Run("math", "rates", "lora", 0.02, 0))
    assert math.isfinite(line["validation"])
    assert not {"test", "retention", "trajectory"} & line.keys()
    assert tiny_run(Run("math", "rates", "lora", 1e30, 0))["validation"] is None  # diverged


def test_diverged_runs_can_be_kept(tiny_run):
    line = tiny_run(Run("commonsense", "seeds", "lora", 1e30, 1))
    assert (line["test"], line["retention"], line["trajectory"], line["gates"]) == (None, None, [], None)
    json.dumps(line, allow_nan=False)


@pytest.mark.parametrize(("candidates", "with_end"), [(False, True), (False, False), (True, True)])
def test_row_losses_equal_one_row_at_a_time(tiny_llama, randomize, candidates, with_end):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=2), torch.Generator().manual_seed(0))
    model, rows = randomize(model).eval(), _rows(20, 3, 0)
    found = row_losses(model, rows, candidates=candidates, with_end=with_end)
    for position, index in enumerate(rows.indices):
        row = rows.table.examples[index]
        losses = []
        for answer in row["answers"]:
            ids = torch.tensor([row["prompt"] + answer])
            labels = ids.clone()
            labels[:, : len(row["prompt"])] = -100
            if not with_end:
                labels[:, -1] = -100
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=labels).loss.item())
        gold = row["gold"]
        assert found.tokens[position] == len(row["answers"][gold]) - (not with_end)
        assert found.sums[position] == pytest.approx(losses[gold] * found.tokens[position], abs=1e-3)
        if candidates:
            assert found.correct[position] == str(int(losses[gold] == min(losses)))


def test_longer_runs_start_with_the_same_batches():
    rows = FamilyRows(_rows(20, 1, 0), _rows(2, 1, 1), _rows(2, 1, 2))
    short, long = rows.batches(3, 4, seed=1), rows.batches(5, 4, seed=1)
    for one, other in zip(short, long, strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert not torch.equal(rows.batches(3, 4, seed=2)[0]["example_ids"], short[0]["example_ids"])
    assert all(batch["attention_mask"].all() for batch in long)
    with pytest.raises(ValueError, match="6 steps of 4 rows, but there are 20 rows"):
        rows.batches(6, 4, seed=1)
