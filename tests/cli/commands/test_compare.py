"""``compare`` as a user calls it: what it prints, what it writes, and what it refuses."""

import json
import random

import pytest

from gatera_lightning.cli.commands.compare import compare
from gatera_lightning.errors import ConfigError


@pytest.fixture
def runs(tmp_path):
    """Two folders with 60 generated answers each; the second run answers more of them right."""
    draw = random.Random(0)
    for name, accuracy in (("base", 0.4), ("better", 0.9)):
        rows = [
            {"task": task, "example": i, "key": f"{task}{i}", "gold": 2}
            | {"generation": {"text": "answer3", "choice": 2 if draw.random() < accuracy else None}}
            for task in ("arc", "boolq")
            for i in range(30)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [str(tmp_path / "base"), str(tmp_path / "better" / "predictions.jsonl")]


def test_prints_and_writes(runs, tmp_path, capsys):
    compare([*runs, "--out", str(tmp_path / "c.md"), "--out", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "## better minus base" in printed
    assert (tmp_path / "c.md").read_text(encoding="utf-8") == printed
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert [run["label"] for run in found["runs"]] == ["base", "better"]
    assert [entry["verdict"] for entry in found["pairs"][0]["accuracy"]] == ["better"] * 3
    compare(runs)
    assert capsys.readouterr().out == printed  # resampling is seeded


def test_the_first_run_is_the_baseline(runs, capsys):
    compare(runs[::-1])
    printed = capsys.readouterr().out
    assert "## base minus better" in printed
    assert printed.count("| worse |\n") == 3
    assert "| better |\n" not in printed


def test_problems_are_named_together_before_anything_is_written(runs, tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        compare([runs[0], str(tmp_path), "absent", "--out", "c.csv", "--out", str(tmp_path / "no" / "c.md")])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "--out c.csv: expected a name that ends in .md or .json" in text
    assert f"there is no folder {tmp_path / 'no'}" in text
    assert "these have: " in text
    assert "absent: no such file or folder" in text
    assert capsys.readouterr().out == ""


def test_one_run_is_not_a_comparison(runs, tmp_path):
    with pytest.raises(ConfigError, match="alone; expected a baseline and at least one other run"):
        compare(runs[:1])
    with pytest.raises(ConfigError, match="given twice"):
        compare([runs[0], runs[0], "--out", str(tmp_path / "c.md")])
    assert not (tmp_path / "c.md").exists()


def test_help_and_unknown_options(capsys):
    for args, status in ((["--help"], 0), (["a", "b", "--seed", "1"], 2), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            compare(args)
        assert caught.value.code == status
    assert "python -m gatera_lightning compare" in capsys.readouterr().out
