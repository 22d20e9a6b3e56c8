"""Tests of the printed tables of results."""

import pytest
from printed_tables import table_cells
from rich.text import Text

from gatera_lightning.evaluation.results import EvaluationResult
from gatera_lightning.evaluation.results_table import print_results


@pytest.mark.parametrize("columns", [44, 80])
def test_table_of_eight_tasks_keeps_all_figures(capsys, monkeypatch, columns):
    """A file has no line breaks inside intervals; a narrow terminal breaks lines but loses no figure."""
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
    examples = [
        {
            "task": task,
            "example": i,
            "gold": i % 2,
            "likelihood": likelihood,
            "generation": {"text": "", "answer": None, "choice": None},
        }
        for i, task in enumerate(tasks)
    ]
    result = EvaluationResult(examples, split_size=10_000)
    print_results(result)
    out = capsys.readouterr().out
    found = table_cells(out)
    for task in tasks:
        assert found[task] == ["1", *(str(result.accuracy(measure, task)) for measure in result.measures)]
    assert found["average"] == ["8", *(str(result.average(measure)) for measure in result.measures)]
    assert "generation: only 8 of 10000 examples, because a limit is set" in out
    assert "generated texts without an answer (counted as wrong): 8" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_results(result)
    on_terminal = Text.from_ansi(capsys.readouterr().out).plain
    assert "…" not in on_terminal
    assert max(map(len, on_terminal.splitlines())) <= columns


def text_example(task, example, text, reference, **scores):
    return {
        "task": task,
        "example": example,
        "gold": 0,
        "generation": {"text": text, "reference": reference, "scores": scores},
    }


def test_table_of_text_metrics(capsys, monkeypatch):
    """F1 and METEOR are means over examples; distinct-1 counts the words of all texts, without articles."""
    monkeypatch.setenv("COLUMNS", "80")
    examples = [
        text_example("pets", 0, "i have a dog", "no i have a cat", token_f1=0.5, meteor=0.2),
        text_example("pets", 1, "yes !", "yes", token_f1=1.0, meteor=0.7),
        text_example("[work]", 2, "i have the dog", "i work", token_f1=0.0, meteor=0.0),
    ]
    result = EvaluationResult(examples, 3, {"bert_score": "there is [no] model"})
    print_results(result, ranking="hits@1")
    out = capsys.readouterr().out
    assert "generated texts compared with their references" in out
    assert "hits@1" not in out
    found = table_cells(out)
    bleu = {task: f"{result.text_metrics(task)['bleu']:.3f}" for task in ("pets", "[work]", None)}
    assert found == {
        "task": ["n", "F1", "METEOR", "BLEU", "distinct-1", "distinct-2"],
        "pets": ["2", "0.750", "0.450", bleu["pets"], "1.000", "1.000"],
        "[work]": ["1", "0.000", "0.000", bleu["[work]"], "1.000", "1.000"],
        "all": ["3", "0.500", "0.300", bleu[None], "0.571", "0.500"],
    }
    assert "skipped bert_score: there is [no] model" in out
    print_results(EvaluationResult(examples[:2], 2), ranking="hits@1")
    assert set(table_cells(capsys.readouterr().out)) == {"task", "pets"}  # a single task needs no row for all


def test_table_shows_dashes_for_task_without_texts(capsys):
    likelihood = {"log_likelihoods": [-1.0], "tokens": [1], "characters": [1], "choice": {}}
    examples = [
        text_example("pets", 0, "yes", "yes", token_f1=1.0),
        {"task": "work", "example": 1, "gold": 0, "likelihood": likelihood},
    ]
    print_results(EvaluationResult(examples, 2))
    assert table_cells(capsys.readouterr().out)["work"] == ["0", "–", "–", "–", "–"]
