"""The table of costs says what the other benchmarks wrote."""

import json

import pytest
from synthetic_ledger import synthetic_ledger

from benchmarks.quality.costs import CONTENDERS, Timings, cost_table, pscp
from benchmarks.quality.methods import METHODS


def _timings(tmp_path):
    step = {name: {"cpu": cpu} for name, cpu in (("lora", [2.0, 2.0, 4.0]), ("gatera", [3.0, 4.0, 4.0]))}
    decoding = {
        name: {"figures": [{"token_s": seconds, "prompt_flops": flops}] * 3}
        for name, seconds, flops in (
            ("backbone", 0.1, 1e12),
            ("gatera", 0.2, 3e12),
            ("gatera_fast", 0.125, 2e12),
        )
    }
    for name, results in (("train_step", step), ("decoding", decoding)):
        settings = {"counted": {method: {"allocated_bytes": 2e9} for method in results}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": results, "settings": settings}))
    return Timings.read(tmp_path)


def _cells(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows}


def test_ratios_are_those_of_the_files(tmp_path):
    lines = synthetic_ledger()
    for line in lines:
        line["cost"]["trained_parameters"] = 5 * 10**8
    cells = _cells(cost_table(lines, _timings(tmp_path)))
    gatera = cells["GateRA"]
    assert gatera["step ÷ LoRA"] == "1.50 (1.00 to 2.00)"
    assert gatera["tokens/s ÷ backbone"].startswith("0.50")
    assert gatera["one weight per token"].startswith("0.80")
    assert gatera["merged"] == "cannot be merged"
    assert gatera["peak MB"] == "2000"
    # all rows are correct; the parameters halve it, and 2 TFLOP and 2 GB take their part
    assert gatera["PSCP"] == f"{0.5 / 1.2 / (1 + 2 / 94):.3f}"
    assert cells["LoRA"]["tokens/s ÷ backbone"] == ""
    assert cells["LoRA"]["PSCP"] == f"{0.5 / (1 + 2 / 94):.3f}"


def test_nothing_is_invented_without_timings(tmp_path):
    cells = _cells(cost_table([], Timings.read(tmp_path)))
    del cells["method"], cells["---"]
    assert len(cells) == len(CONTENDERS)
    for row in cells.values():
        assert {value for name, value in row.items() if name not in ("method", "merged")} == {""}


def test_every_contender_belongs_to_a_method():
    assert CONTENDERS.keys() <= METHODS.keys()


def test_score_of_a_free_method_is_its_accuracy():
    assert pscp(0.8, 0, 0.0, 0) == pytest.approx(0.8)
    assert pscp(0.8, 5 * 10**8, 10.0, 94 * 10**9) == pytest.approx(0.1)
