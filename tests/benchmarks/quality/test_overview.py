"""The overview averages the families, and README's table says what the ledger does."""

import pytest
from synthetic_ledger import EFFECTS, FORGOTTEN, synthetic_ledger

from benchmarks.quality import overview
from benchmarks.quality.comparisons import QUESTIONS
from benchmarks.quality.results import FamilyResults, answers_over_families

GATERA_HIRA = next(
    question for question in QUESTIONS if (question.method, question.reference) == ("gatera", "hira")
)


def _lines(seeds=(1, 2, 3)):
    """Two families; in math, every loss is half a nat per token higher for GateRA."""
    lines = synthetic_ledger() + [
        line for line in synthetic_ledger("math", seeds) if line["stage"] != "untrained"
    ]
    for line in lines:
        if (line["family"], line["stage"], line["method"]) == ("math", "seeds", "gatera"):
            line["test"]["sums"] = [value + 2.5 for value in line["test"]["sums"]]
    return lines


def _rows(table):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [row for row in cells if row]


def test_mean_is_that_of_the_families():
    lines = _lines()
    results = [FamilyResults(name, lines) for name in ("commonsense", "math")]
    mean = answers_over_families(results, "heldout")[GATERA_HIRA]
    own = [found.answers("heldout")[GATERA_HIRA].difference.value for found in results]
    assert own[1] - own[0] == pytest.approx(0.5, abs=0.05)
    assert mean.difference.value == pytest.approx(sum(own) / 2)
    assert mean.difference.low < mean.difference.value < mean.difference.high
    retention = answers_over_families(results, "retention")[GATERA_HIRA].difference.value
    assert retention == pytest.approx(FORGOTTEN["gatera"] - FORGOTTEN["hira"], abs=1e-4)


def test_only_seeds_of_all_families_are_averaged():
    lines = _lines(seeds=(2, 3))
    results = [FamilyResults(name, lines) for name in ("commonsense", "math")]
    assert answers_over_families(results, "heldout")[GATERA_HIRA].seeds == 2
    assert results[0].answers("heldout")[GATERA_HIRA].seeds == 3


def test_tables_show_every_family_beside_the_mean():
    rows = _rows(overview.overview(_lines()))
    assert rows[0] == ["difference", "commonsense", "math", "mean"]
    retention = [row for row in rows if row[0] == "GateRA − HiRA"][1]
    assert retention == ["GateRA − HiRA", *["−0.200 **better**"] * 2, "−0.200 [−0.200, −0.200] **better**"]
    assert overview.overview(synthetic_ledger()) == "Fewer than two families are measured yet."


def test_summary_shows_means_and_leaves_out_what_is_not_measured():
    rows = {row[0]: row for row in _rows(overview.summary(_lines()))}
    assert rows["method"][1:4] == ["commonsense: loss", "accuracy", "forgetting"]
    untrained, lora = float(rows["untrained"][1]), rows["LoRA"]
    assert float(lora[1]) - untrained == pytest.approx(EFFECTS["lora"], abs=0.02)
    assert lora[2:4] == ["1.000", "+0.500"]
    assert lora[5] == "+0.500"
    assert set(rows["DoRA"][1:]) == {""}
