"""Fixtures of the evaluation tests."""

import pytest
from recorded_runs import write_run


@pytest.fixture
def write(tmp_path):
    """``write(name, lines, adapter=None, file=…)``: write a run below the temporary folder."""
    return lambda name, lines, *args, **settings: write_run(tmp_path / name, lines, *args, **settings)


@pytest.fixture
def compare(write):
    """``compare(first, second, …, seed=0)``: compare runs made of lines, labeled a, b, …"""
    from gatera_lightning.evaluation.comparison import compare_runs
    from gatera_lightning.evaluation.recorded_run import read_run

    def compare(*runs, seed=0):
        labels = "abcdef"[: len(runs)]
        found = [read_run(write(label, lines)) for label, lines in zip(labels, runs, strict=True)]
        return compare_runs(found, seed=seed)

    return compare
