"""Tables and pictures say what was put into the ledger."""

import pytest
from synthetic_ledger import EFFECTS, synthetic_ledger

from benchmarks.quality import tables
from benchmarks.quality.pictures import pictures
from benchmarks.quality.results import FamilyResults


def _rows(table):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row for row in cells if row}


def test_methods_and_differences():
    lines = synthetic_ledger()
    rows = _rows(tables.methods(lines, "commonsense"))
    assert rows["GateRA"][1:3] == ["0.016", "3"]
    assert rows["GateRA"][5:8] == ["+0.100", "+0.100", "+0.100"]
    losses = {name: float(rows[title][3].split()[0]) for name, title in (("lora", "LoRA"), ("hira", "HiRA"))}
    untrained = float(rows["untrained"][3])
    for name, loss in losses.items():
        assert loss - untrained == pytest.approx(EFFECTS[name], abs=0.02)
    answers = _rows(tables.answers(lines, "commonsense"))
    assert "−0.200 [−0.200, −0.200] **better**" in answers["Does GateRA beat HiRA?"]
    assert answers["Does HiRA beat LoRA?"][3].endswith("**better**")
    assert tables.answers(synthetic_ledger(seeds=(1,)), "commonsense").count("one seed") == 4 * 3 + 1


def test_seed_that_some_methods_lack_counts_in_differences_only():
    lines = synthetic_ledger(seeds=(1, 2, 3, 4))
    partly = [line for line in lines if (line["method"], line["seed"]) != ("hira", 4)]
    without = [line for line in lines if line["seed"] != 4]
    for table in (tables.methods, tables.equal_loss, tables.gates):
        assert table(partly, "commonsense") == table(without, "commonsense")
    answers = _rows(tables.answers(partly, "commonsense"))
    assert answers["Does GateRA beat LoRA?"][2] == "4"
    assert answers["Does GateRA beat HiRA?"][2] == "3"


def test_diverged_runs_are_counted_and_not_compared():
    lines = synthetic_ledger()
    diverged = [("lora", 1), ("lora", 2), ("lora", 3), ("hira", 1)]
    for line in lines:
        if line["stage"] == "seeds" and (line["method"], line["seed"]) in diverged:
            line |= {"test": None, "retention": None, "trajectory": [], "gates": None}
    rows = _rows(tables.methods(lines, "commonsense"))
    assert rows["LoRA"][1:4] == ["", "3 diverged", ""]
    assert rows["HiRA"][2] == "2, 1 diverged"
    answers = _rows(tables.answers(lines, "commonsense"))
    assert "Does HiRA beat LoRA?" not in answers
    assert answers["Does GateRA beat HiRA?"][2] == "2"
    assert tables.family_section(lines, "commonsense")
    assert pictures(lines)


def test_forgetting_at_equal_loss():
    rows = _rows(tables.equal_loss(synthetic_ledger(), "commonsense"))
    # LoRA ends at the loss that all reach. HiRA's is lower by 0.2 of the 0.6 nats of its second part, in
    # which the change elsewhere goes from 0.075 to 0.3.
    assert rows["LoRA"][2] == "+0.500"
    assert rows["HiRA"][2] == "+0.225"


def test_method_that_never_learns_reaches_no_common_loss():
    lines = synthetic_ledger()
    for line in lines:
        if (line["stage"], line["method"]) == ("seeds", "lora"):
            for point in line["trajectory"]:
                point["heldout"] += 5
    assert _rows(tables.equal_loss(lines, "commonsense"))["LoRA"][2] == "not reached"


def test_rates_and_unmeasured_families():
    lines = synthetic_ledger()
    assert _rows(tables.rates(lines, "commonsense"))["LoRA"][1:4] == ["2.500", "**2.000**", "2.200"]
    assert tables.family_section(lines, "math") == "Not measured yet."
    assert FamilyResults("commonsense", lines).seeds("lora", "gatera_random") == []


def test_pictures_are_reproducible_and_show_every_method():
    drawn = pictures(synthetic_ledger())
    names = ("learning_rates", "retention")
    assert sorted(drawn) == [f"comparison_{name}_commonsense.svg" for name in names]
    assert pictures(synthetic_ledger()) == drawn
    assert drawn["comparison_retention_commonsense.svg"].count("<polyline") == len(EFFECTS)
    assert drawn["comparison_learning_rates_commonsense.svg"].count("<polyline") == len(EFFECTS) - 1
