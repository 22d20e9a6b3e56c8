"""The ledger keeps finished runs, whatever happens while one is written; the committed one is consistent."""

import pytest

from benchmarks.quality import ledger
from benchmarks.quality.families import FAMILIES, MEASURED
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import Run, chosen_rate, rate_curve, rates_to_try


def test_line_cut_off_by_a_kill_does_not_count(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    assert ledger.read(path) == []
    ledger.append(path, {"seed": 1})
    with open(path, "a") as file:
        file.write('{"seed": 2')
    assert ledger.read(path) == [{"seed": 1}]
    ledger.append(path, {"seed": 3})
    assert ledger.read(path) == [{"seed": 1}, {"seed": 3}]


def test_refuses_nan_and_broken_lines(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.append(path, {"validation": float("nan")})
    path.write_text('{"seed": 1}\nseed 2\n{"seed": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        ledger.read(path)


def test_committed_ledger_holds_each_run_once_with_todays_settings():
    lines = ledger.read()
    runs = [Run.of(line) for line in lines]
    assert len(set(runs)) == len(runs)
    for family in MEASURED:
        assert len({line["rows"] for line in lines if line["family"] == family}) <= 1
    for run, line in zip(runs, lines, strict=True):
        if run.stage != "untrained":
            expected = METHODS[run.method].config() | {"batch_size": FAMILIES[run.family].batch_size}
            assert expected.items() <= line["config"].items(), (
                f"{run}: the method changed; give it a new name"
            )


def test_committed_ledger_tests_chosen_rates_only():
    lines = ledger.read()
    for run in map(Run.of, lines):
        if run.stage == "seeds":
            method = METHODS[run.method]
            assert run.seed in method.seeds
            assert run.lr == chosen_rate(lines, run.family, method)
            searched = METHODS[method.rate_of or run.method]
            curve = rate_curve(lines, run.family, searched.name)
            assert set(rates_to_try(lines, run.family, searched)) == set(curve)
            assert min(curve) < run.lr < max(curve)
