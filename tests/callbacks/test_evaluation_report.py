"""Tests of EvaluationReport: what ``test`` and ``predict`` print and write, also with limits and reruns."""

import json
import math
import shutil

import pytest
import torch
from printed_tables import table_cells
from tiny_backbone import sample_rows, tiny_data, tiny_module, tiny_trainer

from gatera_lightning import BackboneConfig, ConfigError, HardGateConfig, adapter_parameters
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.commands.compare import compare
from gatera_lightning.datamodules import DialogueDataModule, MathDataModule

BOTH = ["likelihood", "generation"]


@pytest.fixture(scope="module")
def module(tiny_backbone):
    module = tiny_module(tiny_backbone)
    module.decoding.max_new_tokens = 3
    return module


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """Files of three and five examples."""
    root = tmp_path_factory.mktemp("tasks")
    rows = sample_rows("test")
    (root / "easy.json").write_text(json.dumps(rows[:3]))
    (root / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:8]))
    return [str(root / "easy.json"), str(root / "more.jsonl")]


def run(module, folder, subcommand="test", trainer=None, data=None, **limits):
    """Evaluate in a folder; returns the report."""
    report = EvaluationReport(str(folder))
    trainer = tiny_trainer(folder, report, **limits)
    getattr(trainer, subcommand)(
        module, datamodule=data, **({"verbose": False} if subcommand == "test" else {})
    )
    return report


def test_table_shows_tasks_and_average(module, tiny_backbone, two_tasks, tmp_path, capsys):
    report = run(module, tmp_path, data=tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH))
    out = capsys.readouterr().out
    result, rows = report.result, table_cells(out)
    assert "accuracy [95 % interval]" in out
    for task, n in (("easy", 3), ("more", 5)):
        assert rows[task] == [str(n), *(str(result.accuracy(measure, task)) for measure in result.measures)]
    assert rows["average"] == ["8", *(str(result.average(measure)) for measure in result.measures)]
    assert list(rows).index("average") == len(rows) - 1
    assert f"cross-entropy loss of the correct answers: {result.gold_loss:.4f} nats per token" in out
    assert f"generated texts without an answer (counted as wrong): {result.unanswered()}" in out
    assert f"every prediction: {tmp_path / 'predictions.jsonl'}" in out.replace("\n", "")
    assert "only" not in out


def test_table_of_one_task_has_no_average(module, tiny_backbone, tmp_path, capsys):
    report = run(module, tmp_path, data=tiny_data(tiny_backbone))
    out = capsys.readouterr().out
    assert table_cells(out)["everyday"] == [
        "6",
        *(str(report.result.accuracy(m)) for m in ("sum", "per_token", "per_character")),
    ]
    assert "average" not in table_cells(out)
    assert "generated" not in out


def test_predict_writes_predictions_of_test(module, tiny_backbone, two_tasks, tmp_path, capsys):
    tested, predicted = (
        run(
            module,
            tmp_path / subcommand,
            subcommand,
            data=tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH),
        )
        for subcommand in ("test", "predict")
    )
    path = tmp_path / "predict" / "predictions.jsonl"
    assert f"8 predictions: {path}" in capsys.readouterr().out.replace("\n", "")
    assert path.read_bytes() == (tmp_path / "test" / "predictions.jsonl").read_bytes()
    assert len(path.read_text().splitlines()) == 8
    assert predicted.result == tested.result
    assert not (tmp_path / "predict" / "test_results.json").exists()


@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_batch_limit_omits_complete_examples(module, tiny_backbone, two_tasks, tmp_path, capsys, subcommand):
    data = tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH, eval_batch_size=4)
    report = run(module, tmp_path, subcommand, data=data, **{f"limit_{subcommand}_batches": 1})
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
        assert (f"{kind}: only {count} of 8 examples, because a limit is set" in out) == (
            subcommand == "test"
        )


def test_limited_evaluation_is_completed_without_limit(module, tiny_backbone, tmp_path, capsys):
    for limit, limited in ((2, True), (None, False)):
        report = run(module, tmp_path, data=tiny_data(tiny_backbone), limit_test_batches=limit)
        assert ("because a limit is set" in capsys.readouterr().out) == limited
    summary = json.loads((tmp_path / "test_results.json").read_text())
    assert (summary["rows"], summary["rows_of_split"], len(report.result.examples)) == (6, 6, 6)
    assert 0 < summary["resumed_predictions"] < 6
    assert summary["resumed_predictions"] + summary["computed_predictions"] == 6


@pytest.fixture(scope="module")
def evaluated(module, tiny_backbone, tmp_path_factory):
    """The folder of a completed evaluation."""
    folder = tmp_path_factory.mktemp("evaluated")
    run(module, folder, data=tiny_data(tiny_backbone))
    return folder


@pytest.mark.parametrize("name", ["evaluation.json", "test_results.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": 2', b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_damaged_files_are_named_before_anything_is_computed(
    module, tiny_backbone, evaluated, tmp_path, name, content
):
    folder = shutil.copytree(evaluated, tmp_path / "folder")
    (folder / name).write_bytes(content)
    before = (folder / "predictions.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"^{folder / name}: is no.*; delete the file, or choose another"):
        run(module, folder, data=tiny_data(tiny_backbone))
    assert (folder / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"likelihood": None},
        {"likelihood": {}},
        {"likelihood": {"log_likelihoods": ["a"], "tokens": [1], "characters": [1], "choice": {}}},
        {"likelihood": [1]},
        {"example": "0"},
        {"example": -1},
        {"example": True},
    ],
    ids=str,
)
def test_damaged_predictions_are_named_before_anything_is_computed(
    module, tiny_backbone, evaluated, tmp_path, change
):
    folder = shutil.copytree(evaluated, tmp_path / "folder")
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]
    lines[2] |= change
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=rf"^{folder}.*(line 3: corrupt|example {lines[2]['example']})"):
        run(module, folder, data=tiny_data(tiny_backbone))


def test_folder_that_cannot_be_written_is_named_before_anything_is_computed(module, tiny_backbone, tmp_path):
    (tmp_path / "file").touch()
    problem = rf"{tmp_path}/file/below cannot be written \({tmp_path}/file is not a folder\)"
    with pytest.raises(ConfigError, match=rf"^evaluation\.folder: {problem}"):
        EvaluationReport(str(tmp_path / "file" / "below")).setup(tiny_trainer(tmp_path), module, "test")


def test_completed_evaluation_prints_table_again(module, tiny_backbone, two_tasks, tmp_path, capsys):
    outputs, summaries = [], []
    for _ in range(2):
        run(module, tmp_path, data=tiny_data(tiny_backbone, test=two_tasks, evaluate_by=BOTH))
        outputs.append(capsys.readouterr().out)
        summaries.append(json.loads((tmp_path / "test_results.json").read_text()))
    assert table_cells(outputs[0]) == table_cells(outputs[1])
    assert summaries[1] == summaries[0]  # the record of the run that computed the predictions
    assert (summaries[0]["resumed_predictions"], summaries[0]["computed_predictions"]) == (0, 16)


def test_recomputed_predictions_get_new_record(module, tiny_backbone, tmp_path):
    """The record describes the run that computed the predictions, even if they are equal to earlier ones."""
    run(module, tmp_path, data=tiny_data(tiny_backbone))
    summary = json.loads((tmp_path / "test_results.json").read_text())
    (tmp_path / "test_results.json").write_text(json.dumps(summary | {"wall_seconds": -1}))
    (tmp_path / "predictions.jsonl").unlink()
    run(module, tmp_path, data=tiny_data(tiny_backbone))
    assert json.loads((tmp_path / "test_results.json").read_text())["wall_seconds"] > 0


def test_all_measures_are_logged(module, tiny_backbone, tmp_path):
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


def test_second_evaluation_does_not_reuse_first(module, tiny_backbone, tmp_path):
    report = EvaluationReport()
    trainer = tiny_trainer(tmp_path, report)
    for rows in (6, 2):
        trainer.test(module, datamodule=tiny_data(tiny_backbone, test=[f"everyday[:{rows}]"]), verbose=False)
        assert len(report.result.examples) == rows


def test_trainer_without_report_gets_one(module, tiny_backbone, tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.test(module, datamodule=tiny_data(tiny_backbone), verbose=False)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6


def test_folder_expands_environment_variables(module, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS", str(tmp_path / "results"))
    trainer = tiny_trainer(tmp_path, EvaluationReport("$RESULTS/tiny"))
    trainer.test(module, datamodule=tiny_data(tiny_backbone, test=["everyday[:1]"]), verbose=False)
    assert (tmp_path / "results" / "tiny" / "test_results.json").is_file()


def test_example_predicted_by_two_ranks_is_an_error(module, tiny_backbone, tmp_path, monkeypatch):
    """Otherwise one of two predictions would be used silently, if examples were divided incorrectly."""
    import gatera_lightning.callbacks.evaluation_report as source

    report = EvaluationReport()
    monkeypatch.setattr(source, "gather_objects", lambda records: [records, dict(list(records.items())[-1:])])
    with pytest.raises(
        RuntimeError, match=r"1 examples were predicted by two ranks, \('likelihood', \d\) among them"
    ):
        tiny_trainer(tmp_path, report).test(module, datamodule=tiny_data(tiny_backbone), verbose=False)


# --- ranked replies, and solutions without other candidates ---


def connected(folder, data_class, **settings):
    """A data module of embedded samples, connected to the tokenizer in ``folder``."""
    data = data_class(template="plain", train_on="response", max_length=400, **settings)
    data.connect(load_tokenizer(BackboneConfig(id=str(folder))))
    return data


@pytest.fixture
def dialogue(tiny_backbone):
    """Two conversations with eight replies, each among twenty candidates."""
    return connected(tiny_backbone, DialogueDataModule, test=["smalltalk[:2]"], eval_batch_size=40)


@pytest.fixture
def arithmetic(tiny_backbone):
    """Six word problems, each with its solution as the only candidate."""
    return connected(tiny_backbone, MathDataModule, test=["arithmetic[:6]"], answer_style="gsm8k")


def summary_of(folder):
    return json.loads((folder / "test_results.json").read_text())


def test_dialogue_report_has_hits_at_1_and_perplexity(module, dialogue, tmp_path, capsys):
    report = run(module, tmp_path, data=dialogue)
    out = capsys.readouterr().out
    summary, likelihoods = summary_of(tmp_path), [row["likelihood"] for row in report.result.examples]
    assert "hits@1 [95 % interval]" in out
    assert "accuracy" not in out
    assert table_cells(out)["smalltalk"] == [
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


def test_examples_without_candidates_have_no_accuracy(module, arithmetic, tmp_path, capsys):
    report = run(module, tmp_path, data=arithmetic)
    out = capsys.readouterr().out
    summary = summary_of(tmp_path)
    assert (table_cells(out), report.result.measures) == ({}, [])
    assert "accuracy" not in out
    assert f"loss of the correct answers: {report.result.gold_loss:.4f} nats per token (perplexity " in out
    assert (summary["rows"], summary["average"], summary["tasks"]) == (6, {}, {"arithmetic": {}})
    assert summary["perplexity"] == pytest.approx(math.exp(summary["nats_per_target_token"]))


def test_examples_without_candidates_are_compared_by_loss(tiny_backbone, arithmetic, tmp_path, capsys):
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


def test_generated_solutions_have_accuracy(module, arithmetic, tmp_path, capsys):
    arithmetic.evaluate_by = ["generation"]
    report = run(module, tmp_path, data=arithmetic)
    out = capsys.readouterr().out
    assert "accuracy [95 % interval]" in out
    assert table_cells(out)["arithmetic"] == ["6", "0.000 [0.000, 0.390]"]
    assert f"generated texts without an answer (counted as wrong): {report.result.unanswered()}" in out
    assert all(list(row["generation"]) == ["text", "answer", "choice"] for row in report.result.examples)
    assert (summary_of(tmp_path)["text"], summary_of(tmp_path)["text_skipped"]) == ({}, {})


def test_invalid_bert_layer_is_rejected():
    with pytest.raises(ValueError, match=r"evaluation\.bert_layer: 0; accepted: an integer of at least 1"):
        EvaluationReport(bert_layer=0)


@pytest.mark.parametrize("evaluate_by", [["likelihood"], ["generation"]], ids=" ".join)
def test_report_has_the_share_of_tokens_that_gates_skip(
    tiny_backbone, tmp_path, capsys, randomize, evaluate_by
):
    module = tiny_module(tiny_backbone, gate=HardGateConfig(bias=0.0))
    module.decoding.max_new_tokens = 3
    module.configure_model()
    randomize(module.model)
    data = tiny_data(tiny_backbone, evaluate_by=evaluate_by)
    run(module, tmp_path, data=data)
    skipped = json.loads((tmp_path / "test_results.json").read_text())["skipped_tokens"]
    assert f"tokens skipped by gates: {skipped['share']:.1%} of {skipped['tokens']:,} tokens" in (
        capsys.readouterr().out.replace("\n", "")
    )
    assert list(skipped["modules"]) == list(module.report.layers)
    assert list(skipped["layers"]) == ["0", "1"]
    assert 0 < skipped["share"] < 1
    table = data.tables["test"]
    prompts = sum(map(len, table["prompt"]))
    assert skipped["tokens"] >= prompts
    assert (skipped["tokens"] == prompts) == (evaluate_by == ["generation"])
