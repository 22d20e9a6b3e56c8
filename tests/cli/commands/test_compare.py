"""``compare``: what it prints, what it writes, and what it rejects."""

import json
import random

import pytest

from gatera_lightning.cli.commands.compare import compare
from gatera_lightning.cli.main import main


@pytest.fixture
def runs(tmp_path):
    """Two folders with 60 generated answers each; more answers of the second run are correct."""
    draw = random.Random(0)
    for name, accuracy in (("base", 0.4), ("better", 0.9)):
        records = [
            {"task": task, "example": i, "key": f"{task}{i}", "gold": 2}
            | {"generation": {"text": "answer3", "choice": 2 if draw.random() < accuracy else None}}
            for task in ("arc", "boolq")
            for i in range(30)
        ]
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "predictions.jsonl").write_text(lines)
    return [str(tmp_path / "base"), str(tmp_path / "better" / "predictions.jsonl")]


def test_compare_prints_and_writes_the_report(runs, tmp_path, capsys):
    compare([*runs, "--out", str(tmp_path / "c.md"), "--out", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "## better minus base" in printed
    assert (tmp_path / "c.md").read_text(encoding="utf-8") == printed
    report = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert [run["label"] for run in report["runs"]] == ["base", "better"]
    assert [entry["verdict"] for entry in report["pairs"][0]["accuracy"]] == ["better"] * 3
    assert main(["compare", *runs]) == 0
    assert capsys.readouterr().out == printed  # resampling is seeded


def test_first_run_is_the_baseline(runs, capsys):
    compare(runs[::-1])
    printed = capsys.readouterr().out
    assert "## base minus better" in printed
    assert printed.count("| worse |\n") == 3
    assert "| better |\n" not in printed


def test_compare_reports_all_problems_at_once(runs, tmp_path, problems):
    missing = tmp_path / "missing"
    reported = problems(
        *("compare", runs[0], str(tmp_path), "absent"),
        *("--out", "c.csv", "--out", str(missing / "c.md")),
    )
    assert len(reported) == 4
    text = "\n".join(reported)
    assert "--out c.csv: expected a name that ends in .md or .json" in text
    assert f"--out {missing / 'c.md'}: the folder {missing} does not exist" in text
    assert f"{tmp_path}: " in text
    assert "absent: no such file or folder" in text


@pytest.mark.parametrize("name", ["evaluation.json", "test_results.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": ', b"[]", b"7", b"\xff", b"[" * 100_000])
def test_damaged_files_of_a_run_are_named(runs, tmp_path, problems, name, content):
    (tmp_path / "base" / name).write_bytes(content)
    (problem,) = problems("compare", *runs)
    assert problem.startswith(f"{tmp_path / 'base' / name}: is no")


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b"null", b'{"task": "a"}', b"\xff", b"9" * 5_000])
def test_damaged_predictions_are_named(runs, tmp_path, problems, line):
    with (tmp_path / "base" / "predictions.jsonl").open("ab") as file:
        file.write(line)
    (problem,) = problems("compare", *runs)
    assert problem.startswith(f"{tmp_path / 'base' / 'predictions.jsonl'}, line 61: ")


def test_existing_report_stays_if_the_new_one_cannot_be_written(runs, tmp_path, monkeypatch):
    out = tmp_path / "c.md"
    out.write_text("old")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        compare([*runs, "--out", str(out)])
    assert out.read_text() == "old"


def test_compare_needs_two_different_runs(runs, tmp_path, problems):
    assert problems("compare", runs[0]) == [
        f"RUN: got {runs[0]} alone; expected a baseline and at least one other run"
    ]
    (problem,) = problems("compare", runs[0], runs[0], "--out", str(tmp_path / "c.md"))
    assert "twice" in problem
    assert not (tmp_path / "c.md").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "b", "--seed", "1"], "--seed: there is no such setting"),
        (["a", "b", "--ot", "c.md"], "--ot: there is no such setting; did you mean '--out'?"),
        ([], "RUN: required, but not given"),
    ],
    ids=["unknown flag", "typo", "no run"],
)
def test_compare_rejects_wrong_arguments(parser_error, args, message):
    assert parser_error("compare", *args) == message
