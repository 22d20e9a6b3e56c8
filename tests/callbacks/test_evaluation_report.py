"""The table and the files of ``test`` and ``predict`` say what the ranking says."""

import json

import pytest
from tiny_backbone import PlainQuestion, run_program, sample_rows, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.evaluation_report import EvaluationReport


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, tmp_path_factory):
    """Two tasks of three and five rows, tested and predicted: report, folder."""
    root = tmp_path_factory.mktemp("report")
    rows = sample_rows("test")
    (root / "easy.json").write_text(json.dumps(rows[:3]))
    (root / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:8]))
    module, report = tiny_module(tiny_backbone), EvaluationReport()
    data = tiny_data(tiny_backbone, test=[str(root / "easy.json"), str(root / "more.jsonl")])
    trainer = tiny_trainer(root / "log", report)
    trainer.test(module, datamodule=data, verbose=False)
    tested = report.result
    trainer.predict(module, datamodule=data)
    return tested, report.result, root / "log"


def test_results_equal_the_ranking(evaluated):
    result, _, folder = evaluated
    written = json.loads((folder / "test_results.json").read_text())
    assert written["nats_per_target_token"] == result.gold_loss
    assert list(written["tasks"]) == ["easy", "more", "all"]
    for name, asked in (("easy", result.questions[:3]), ("more", result.questions[3:]), ("all", result.questions)):
        task = written["tasks"][name]
        assert task["n"] == len(asked)
        for score in ("sum", "per_token"):
            hits = sum(q.choice(score) == q.gold for q in asked)
            assert task[f"accuracy_{score}"] == hits / len(asked)
            low, high = task[f"accuracy_{score}_interval"]
            assert low - 1e-9 <= hits / len(asked) <= high + 1e-9
            assert high - low > 0.3  # few questions, wide intervals


def test_predictions_equal_the_ranking(evaluated):
    tested, predicted, folder = evaluated
    assert predicted == tested
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(8))
    assert [line["task"] for line in lines] == ["easy"] * 3 + ["more"] * 5
    assert [line["gold"] for line in lines] == [PlainQuestion.of(row).gold for row in sample_rows("test")[:8]]
    for line, question in zip(lines, tested.questions, strict=True):
        assert tuple(line["log_likelihoods"]) == question.log_likelihoods
        assert tuple(line["tokens"]) == question.tokens
        assert (line["choice_sum"], line["choice_per_token"]) == (question.choice("sum"), question.choice("per_token"))


def test_the_table(tiny_backbone, tmp_path, capsys):
    report = EvaluationReport()
    trainer = tiny_trainer(tmp_path, report)
    trainer.test(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), verbose=False)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "everyday" in line)
    assert str(report.result.accuracy("sum")) in row
    assert str(report.result.accuracy("per_token")) in row
    assert "│ all" not in out  # one task needs no sum
    assert f"right answers: {report.result.gold_loss:.4f} nats per target token" in out


def test_a_second_evaluation_forgets_the_first(tiny_backbone, tmp_path):
    module, report = tiny_module(tiny_backbone), EvaluationReport()
    trainer = tiny_trainer(tmp_path, report)
    for rows in (6, 2):
        trainer.test(module, datamodule=tiny_data(tiny_backbone, test=[f"everyday[:{rows}]"]), verbose=False)
        assert len(report.result.questions) == rows


@pytest.mark.slow
def test_two_processes_give_the_same_results(tiny_backbone, tmp_path):
    args = ["--config", "quickstart.yaml", *tiny_args(tiny_backbone)]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    run_program("test", *args, *two, cwd=tmp_path, timeout=90)
    run_program("predict", *args, *two, cwd=tmp_path, timeout=90)
    trainer = tiny_trainer(tmp_path / "one", EvaluationReport())
    trainer.test(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), verbose=False)
    (found,) = tmp_path.glob("runs/quickstart/*/test_results.json")
    found, expected = json.loads(found.read_text()), json.loads((tmp_path / "one" / "test_results.json").read_text())
    assert found["tasks"] == expected["tasks"]
    assert found["nats_per_target_token"] == pytest.approx(expected["nats_per_target_token"], rel=1e-5)
    (predictions,) = tmp_path.glob("runs/quickstart/*/predictions.jsonl")
    assert [json.loads(line)["example"] for line in predictions.read_text().splitlines()] == list(range(6))
