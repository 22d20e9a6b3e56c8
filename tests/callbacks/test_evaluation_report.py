"""What ``test`` and ``predict`` print and leave behind, limits and reruns included."""

import json
import math
import re

import pytest
import torch
from rich.text import Text
from tiny_backbone import sample_rows, tiny_data, tiny_module, tiny_trainer

from gatera_lightning import BackboneConfig, adapter_parameters
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.commands.compare import compare
from gatera_lightning.datamodules import DialogueDataModule, MathDataModule
from gatera_lightning.evaluation.results import EvaluationResult
from gatera_lightning.evaluation.results_table import print_results

BOTH = ["likelihood", "generation"]


@pytest.fixture(scope="module")
def module(tiny_backbone):
    module = tiny_module(tiny_backbone)
    module.decoding.max_new_tokens = 3
    return module


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """Sources of three and five rows."""
    root = tmp_path_factory.mktemp("tasks")
    rows = sample_rows("test")
    (root / "easy.json").write_text(json.dumps(rows[:3]))
    (root / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:8]))
    return [str(root / "easy.json"), str(root / "more.jsonl")]


def run(module, folder, verb="test", trainer=None, data=None, **limits):
    """The report of one run on a folder of its own."""
    report = EvaluationReport(str(folder))
    trainer = tiny_trainer(folder, report, **limits)
    getattr(trainer, verb)(module, datamodule=data, **({"verbose": False} if verb == "test" else {}))
    return report


def cells(out):
    """The table's rows by their first cell."""
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if re.search("[│┃]", line)
    ]
    return {row[0]: row[1:] for row in rows}


def test_the_table_holds_tasks_numbers_and_the_average(module, tiny_backbone, two_tasks, tmp_path, capsys):
    report = run(module, tmp_path, data=tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH))
    out = capsys.readouterr().out
    result, rows = report.result, cells(out)
    assert "accuracy [95 % interval]" in out
    for task, n in (("easy", 3), ("more", 5)):
        assert rows[task] == [str(n), *(str(result.accuracy(measure, task)) for measure in result.measures)]
    assert rows["average"] == ["8", *(str(result.average(measure)) for measure in result.measures)]
    assert list(rows).index("average") == len(rows) - 1
    assert f"cross-entropy loss of the correct answers: {result.gold_loss:.4f} nats per token" in out
    assert f"generated texts without an answer (counted as wrong): {result.unanswered()}" in out
    assert f"every prediction: {tmp_path / 'predictions.jsonl'}" in out.replace("\n", "")
    assert "only" not in out


def test_one_task_needs_no_average(module, tiny_backbone, tmp_path, capsys):
    report = run(module, tmp_path, data=tiny_data(tiny_backbone))
    out = capsys.readouterr().out
    assert cells(out)["everyday"] == [
        "6",
        *(str(report.result.accuracy(m)) for m in ("sum", "per_token", "per_character")),
    ]
    assert "average" not in cells(out)
    assert "generated" not in out


@pytest.mark.parametrize("columns", [44, 80])
def test_eight_tasks_and_every_measure_break_no_interval(capsys, monkeypatch, columns):
    """In a file, that is. A narrow terminal breaks figures, and loses none."""
    monkeypatch.setenv("COLUMNS", str(columns))
    likelihood = {"log_likelihoods": [-1.0, -2.0], "tokens": [1, 1], "characters": [1, 1]}
    likelihood["choice"] = dict.fromkeys(("sum", "per_token", "per_character"), 0)
    tasks = [
        "ARC-Challenge",
        "ARC-Easy",
        "boolq",
        "hellaswag",
        "openbookqa",
        "piqa",
        "social_i_qa",
        "[winogrande]",
    ]
    rows = [
        {
            "task": task,
            "example": i,
            "gold": i % 2,
            "likelihood": likelihood,
            "generation": {"text": "", "answer": None, "choice": None},
        }
        for i, task in enumerate(tasks)
    ]
    result = EvaluationResult(rows, split_size=10_000)
    print_results(result)
    out = capsys.readouterr().out
    found = cells(out)
    for task in tasks:
        assert found[task] == ["1", *(str(result.accuracy(measure, task)) for measure in result.measures)]
    assert found["average"] == ["8", *(str(result.average(measure)) for measure in result.measures)]
    assert "generation: only 8 of 10000 examples, because the number of batches is limited" in out
    assert "generated texts without an answer (counted as wrong): 8" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_results(result)
    on_terminal = Text.from_ansi(capsys.readouterr().out).plain
    assert "…" not in on_terminal
    assert max(map(len, on_terminal.splitlines())) <= columns


def test_predict_writes_the_lines_of_test(module, tiny_backbone, two_tasks, tmp_path, capsys):
    tested, predicted = (
        run(module, tmp_path / verb, verb, data=tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH))
        for verb in ("test", "predict")
    )
    path = tmp_path / "predict" / "predictions.jsonl"
    assert f"8 predictions: {path}" in capsys.readouterr().out.replace("\n", "")
    assert path.read_bytes() == (tmp_path / "test" / "predictions.jsonl").read_bytes()
    assert len(path.read_text().splitlines()) == 8
    assert predicted.result == tested.result
    assert not (tmp_path / "predict" / "test_results.json").exists()


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_limit_leaves_out_whole_questions(module, tiny_backbone, two_tasks, tmp_path, capsys, verb):
    data = tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH, eval_batch_size=4)
    report = run(module, tmp_path, verb, data=data, **{f"limit_{verb}_batches": 1})
    likelihoods = {row["example"]: row["likelihood"] for row in report.result.examples if "likelihood" in row}
    assert len(likelihoods) == 1
    for example, found in likelihoods.items():
        assert [len(found[name]) for name in ("log_likelihoods", "tokens", "characters")] == [
            len(data.tables["test"]["answers"][example])
        ] * 3
    assert sum("generation" in row for row in report.result.examples) == 4
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == len(report.result.examples) < 8
    out = capsys.readouterr().out
    for kind in ("likelihood", "generation"):
        count = sum(kind in row for row in report.result.examples)
        assert (f"{kind}: only {count} of 8 examples, because the number of batches is limited" in out) == (
            verb == "test"
        )


def test_a_limit_is_said_and_the_rest_computed_without_it(module, tiny_backbone, tmp_path, capsys):
    for limit, said in ((2, True), (None, False)):
        report = run(module, tmp_path, data=tiny_data(tiny_backbone), limit_test_batches=limit)
        assert ("because the number of batches is limited" in capsys.readouterr().out) == said
    summary = json.loads((tmp_path / "test_results.json").read_text())
    assert (summary["rows"], summary["rows_of_split"], len(report.result.examples)) == (6, 6, 6)
    assert 0 < summary["resumed_predictions"] < 6
    assert summary["resumed_predictions"] + summary["computed_predictions"] == 6


def test_a_completed_run_prints_its_table_again(module, tiny_backbone, two_tasks, tmp_path, capsys):
    outs, summaries = [], []
    for _ in range(2):
        run(module, tmp_path, data=tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH))
        outs.append(capsys.readouterr().out)
        summaries.append(json.loads((tmp_path / "test_results.json").read_text()))
    assert cells(outs[0]) == cells(outs[1])
    assert summaries[1] == summaries[0]  # the record of the run that computed it
    assert (summaries[0]["resumed_predictions"], summaries[0]["computed_predictions"]) == (0, 16)


def test_what_is_computed_anew_is_written_anew(module, tiny_backbone, tmp_path):
    """Also where the numbers are the old ones: the record is of the run that computed them."""
    run(module, tmp_path, data=tiny_data(tiny_backbone))
    summary = json.loads((tmp_path / "test_results.json").read_text())
    (tmp_path / "test_results.json").write_text(json.dumps(summary | {"wall_seconds": -1}))
    (tmp_path / "predictions.jsonl").unlink()
    run(module, tmp_path, data=tiny_data(tiny_backbone))
    assert json.loads((tmp_path / "test_results.json").read_text())["wall_seconds"] > 0


def test_metrics_are_logged_for_every_measure(module, tiny_backbone, tmp_path):
    report = EvaluationReport()
    metrics = tiny_trainer(tmp_path, report).test(
        module, datamodule=tiny_data(tiny_backbone, evaluate_by=BOTH), verbose=False
    )
    logged = {name: value for part in metrics for name, value in part.items()}
    names = {"sum", "per_token", "per_character", "generation"}
    assert set(logged) == {"test/loss", *(f"test/accuracy_{name}" for name in names)}
    assert all(
        logged[f"test/accuracy_{name}"] == pytest.approx(report.result.average(name).value) for name in names
    )


def test_a_second_evaluation_forgets_the_first(module, tiny_backbone, tmp_path):
    report = EvaluationReport()
    trainer = tiny_trainer(tmp_path, report)
    for rows in (6, 2):
        trainer.test(module, datamodule=tiny_data(tiny_backbone, test=[f"everyday[:{rows}]"]), verbose=False)
        assert len(report.result.examples) == rows


def test_a_trainer_without_a_report_gets_one(module, tiny_backbone, tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.test(module, datamodule=tiny_data(tiny_backbone), verbose=False)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6


def test_the_folder_may_hold_variables(module, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS", str(tmp_path / "results"))
    trainer = tiny_trainer(tmp_path, EvaluationReport("$RESULTS/tiny"))
    trainer.test(module, datamodule=tiny_data(tiny_backbone, test=["everyday[:1]"]), verbose=False)
    assert (tmp_path / "results" / "tiny" / "test_results.json").is_file()


def test_two_processes_with_the_same_row_are_an_error(module, tiny_backbone, tmp_path, monkeypatch):
    """What would happen if rows were shared out wrongly; else one of two predictions would silently win."""
    import gatera_lightning.callbacks.evaluation_report as source

    report = EvaluationReport()
    monkeypatch.setattr(
        source, "_from_every_rank", lambda records: [records, dict(list(records.items())[-1:])]
    )
    with pytest.raises(
        RuntimeError, match=r"1 rows were predicted by two processes, \('likelihood', \d\) among them"
    ):
        tiny_trainer(tmp_path, report).test(module, datamodule=tiny_data(tiny_backbone), verbose=False)


# --- where an answer's text is neither right nor wrong, or alone -----------------------------------------------------


def connected(folder, family, **settings):
    """A family's data of the embedded sample, connected to the tokenizer in ``folder``."""
    data = family(template="plain", train_on="response", max_length=400, **settings)
    data.connect(load_tokenizer(BackboneConfig(id=str(folder))))
    return data


@pytest.fixture
def dialogue(tiny_backbone):
    """Two conversations: eight replies, each among twenty."""
    return connected(tiny_backbone, DialogueDataModule, test=["smalltalk[:2]"], eval_batch_size=40)


@pytest.fixture
def arithmetic(tiny_backbone):
    """Six word problems, each with its solution alone."""
    return connected(tiny_backbone, MathDataModule, test=["arithmetic[:6]"], answer_style="gsm8k")


def summary_of(folder):
    return json.loads((folder / "test_results.json").read_text())


def test_replies_that_are_ranked_have_hits_at_1_and_a_perplexity(module, dialogue, tmp_path, capsys):
    report = run(module, tmp_path, data=dialogue)
    out = capsys.readouterr().out
    summary, likelihoods = summary_of(tmp_path), [row["likelihood"] for row in report.result.examples]
    assert "hits@1 [95 % interval]" in out
    assert "accuracy" not in out
    assert cells(out)["smalltalk"] == [
        "8",
        *(str(report.result.accuracy(m)) for m in ("sum", "per_token", "per_character")),
    ]
    assert [len(found["tokens"]) for found in likelihoods] == [20] * 8
    nats = -sum(found["log_likelihoods"][19] for found in likelihoods) / sum(
        found["tokens"][19] for found in likelihoods
    )
    loss = f"{nats:.4f} nats per token (perplexity {math.exp(nats):.2f}), 8 examples"
    assert f"cross-entropy loss of the correct answers: {loss}" in out
    assert (summary["nats_per_target_token"], summary["perplexity"]) == pytest.approx((nats, math.exp(nats)))
    assert (summary["text"], summary["text_skipped"]) == ({}, {})
    assert "skipped" not in out


def test_a_solution_alone_has_no_accuracy(module, arithmetic, tmp_path, capsys):
    report = run(module, tmp_path, data=arithmetic)
    out = capsys.readouterr().out
    summary = summary_of(tmp_path)
    assert (cells(out), report.result.measures) == ({}, [])
    assert "accuracy" not in out
    assert f"loss of the correct answers: {report.result.gold_loss:.4f} nats per token (perplexity " in out
    assert (summary["rows"], summary["average"], summary["tasks"]) == (6, {}, {"arithmetic": {}})
    assert summary["perplexity"] == pytest.approx(math.exp(summary["nats_per_target_token"]))


def test_two_runs_of_solutions_compare_by_nats_alone(tiny_backbone, arithmetic, tmp_path, capsys):
    for name, size in (("one", 0.0), ("other", 1.0)):
        module = tiny_module(tiny_backbone)
        module.configure_model()
        with torch.no_grad():
            for parameter in adapter_parameters(module.model).values():
                parameter.add_(
                    size
                    * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                )
        run(module, tmp_path / name, data=arithmetic)
    capsys.readouterr()
    compare([str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(tmp_path / "out.json")])
    found, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    nats = [summary_of(tmp_path / name)["nats_per_target_token"] for name in ("one", "other")]
    assert "accuracy" not in out.partition("- Brackets")[0].lower()
    assert [run["accuracy"] for run in found["runs"]] == [{}, {}]
    assert [run["nats_per_token"] for run in found["runs"]] == pytest.approx(nats)
    assert found["pairs"][0]["nats_per_token"]["value"] == pytest.approx(nats[1] - nats[0])
    assert abs(nats[1] - nats[0]) > 1e-3


def test_generated_solutions_are_judged_all_the_same(module, arithmetic, tmp_path, capsys):
    arithmetic.evaluate_by = ["generation"]
    report = run(module, tmp_path, data=arithmetic)
    out = capsys.readouterr().out
    assert "accuracy [95 % interval]" in out
    assert cells(out)["arithmetic"] == ["6", "0.000 [0.000, 0.390]"]
    assert f"generated texts without an answer (counted as wrong): {report.result.unanswered()}" in out
    assert all(list(row["generation"]) == ["text", "answer", "choice"] for row in report.result.examples)
    assert (summary_of(tmp_path)["text"], summary_of(tmp_path)["text_skipped"]) == ({}, {})


def text_row(task, example, text, reference, **scores):
    return {
        "task": task,
        "example": example,
        "gold": 0,
        "generation": {"text": text, "reference": reference, "scores": scores},
    }


def test_the_table_of_texts(capsys, monkeypatch):
    """By hand: F1 and METEOR are means over rows; distinct-1 counts i have dog · yes · i have dog."""
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        text_row("pets", 0, "i have a dog", "no i have a cat", token_f1=0.5, meteor=0.2),
        text_row("pets", 1, "yes !", "yes", token_f1=1.0, meteor=0.7),
        text_row("[work]", 2, "i have the dog", "i work", token_f1=0.0, meteor=0.0),
    ]
    result = EvaluationResult(rows, 3, {"bert_score": "there is [no] model"})
    print_results(result, ranking="hits@1")
    out = capsys.readouterr().out
    assert "generated texts compared with their references" in out
    assert "hits@1" not in out
    found = cells(out)
    bleu = {task: f"{result.text_metrics(task)['bleu']:.3f}" for task in ("pets", "[work]", None)}
    assert found == {
        "task": ["n", "F1", "METEOR", "BLEU", "distinct-1", "distinct-2"],
        "pets": ["2", "0.750", "0.450", bleu["pets"], "1.000", "1.000"],
        "[work]": ["1", "0.000", "0.000", bleu["[work]"], "1.000", "1.000"],
        "all": ["3", "0.500", "0.300", bleu[None], "0.571", "0.500"],
    }
    assert "skipped bert_score: there is [no] model" in out
    print_results(EvaluationResult(rows[:2], 2), ranking="hits@1")
    assert set(cells(capsys.readouterr().out)) == {"task", "pets"}  # one task needs no line for all


def test_a_task_without_texts_has_dashes(capsys):
    likelihood = {"log_likelihoods": [-1.0], "tokens": [1], "characters": [1], "choice": {}}
    rows = [
        text_row("pets", 0, "yes", "yes", token_f1=1.0),
        {"task": "work", "example": 1, "gold": 0, "likelihood": likelihood},
    ]
    print_results(EvaluationResult(rows, 2))
    assert cells(capsys.readouterr().out)["work"] == ["0", "–", "–", "–", "–"]


def test_a_layer_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match=r"evaluation\.bert_layer: 0; accepted: an integer of at least 1"):
        EvaluationReport(bert_layer=0)
