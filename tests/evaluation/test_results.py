"""Results: counted by hand from a few rows, and from the predictions on disk for a whole run."""

import importlib.metadata
import json
import math
from typing import get_args

import pytest
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.evaluation.answers import Reading
from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.ranking import Score
from gatera_lightning.evaluation.results import EvaluationResult

SCORES = ("sum", "per_token", "per_character")


def row(task, example, gold, likelihood=None, generation="none", nats=(1.0, 2.0), tokens=(1, 4)):
    """One line of predictions; ``likelihood`` is what each score chooses, ``generation`` what the text says."""
    found = {"task": task, "example": example, "key": f"{task}{example}", "gold": gold}
    if likelihood is not None:
        choice = dict(zip(SCORES, likelihood, strict=True))
        found["likelihood"] = {
            "log_likelihoods": [-n for n in nats], "tokens": list(tokens), "characters": [3, 9], "choice": choice
        }  # fmt: skip
    return found | ({} if generation == "none" else {"generation": {"text": "…", "answer": generation, "choice": generation}})


ROWS = [
    row("easy", 0, 0, (0, 1, 0), 0),
    row("easy", 1, 0, (0, 0, 1), None),
    row("easy", 2, 1, (0, 1, 1), 1, nats=(5.0, 7.0), tokens=(2, 3)),
    row("hard", 3, 0, (1, 1, 1), None),
]


def test_accuracies_by_hand():
    result = EvaluationResult(ROWS, expected=4)
    assert result.tasks == ["easy", "hard"]
    assert result.measures == [*SCORES, "generation"]
    hits = {measure: [result.accuracy(measure, task) for task in ("easy", "hard", None, "none")] for measure in result.measures}
    assert hits == {
        "sum": [Proportion(2, 3), Proportion(0, 1), Proportion(2, 4), Proportion(0, 0)],
        "per_token": [Proportion(2, 3), Proportion(0, 1), Proportion(2, 4), Proportion(0, 0)],
        "per_character": [Proportion(2, 3), Proportion(0, 1), Proportion(2, 4), Proportion(0, 0)],
        "generation": [Proportion(2, 3), Proportion(0, 1), Proportion(2, 4), Proportion(0, 0)],
    }
    other = EvaluationResult([row("easy", 0, 1, (1, 0, 0), 0), row("easy", 1, 0, (0, 0, 1), 1)], expected=2)
    assert [other.accuracy(measure).hits for measure in other.measures] == [2, 1, 0, 0]


def test_the_average_counts_tasks_alike():
    result = EvaluationResult(ROWS, expected=4)
    assert result.average("sum") == Average((Proportion(2, 3), Proportion(0, 1)))
    assert result.average("sum").value == pytest.approx(1 / 3)
    assert result.accuracy("sum").value == 0.5


def test_a_text_without_an_answer_is_wrong_and_counted():
    result = EvaluationResult(ROWS, expected=4)
    assert [result.unanswered(task) for task in (None, "easy", "hard")] == [2, 1, 1]
    assert result.accuracy("generation") == Proportion(2, 4)
    assert EvaluationResult([row("a", 0, 0, generation=None)], 1).accuracy("generation") == Proportion(0, 1)


def test_the_loss_is_pooled_over_the_tokens_of_right_answers():
    assert EvaluationResult(ROWS, expected=4).gold_loss == pytest.approx((1 + 1 + 7 + 1) / (1 + 1 + 3 + 1))


def test_only_what_was_evaluated_is_measured():
    generated = EvaluationResult([row("a", 0, 0, generation=0)], expected=1)
    assert (generated.measures, generated.gold_loss) == (["generation"], None)
    assert set(generated.summary()["tasks"]["a"]) == {"generation"}
    ranked = EvaluationResult([row("a", 0, 0, (0, 0, 0))], expected=1)
    assert (ranked.measures, ranked.unanswered()) == (list(SCORES), 0)
    assert set(ranked.summary()["tasks"]["a"]) == set(SCORES)


def test_no_rows_are_no_measures():
    summary = EvaluationResult([], expected=3).summary()
    nothing = {"nats_per_target_token": None, "perplexity": None, "text": {}, "text_skipped": {}}
    assert summary == {"rows": 0, "rows_of_split": 3, "tasks": {}, "average": {}} | nothing


# --- a whole run ---


def read_oddly(text, labels):
    """An option out of most texts, for a random model states none; it depends on all that is to be read."""
    choice = (None, *range(len(labels)))[sum(map(ord, text + "".join(labels))) % (len(labels) + 1)]
    return Reading(None if choice is None else labels[choice], choice)


@pytest.fixture(scope="module")
def recorded(tiny_backbone, tmp_path_factory):
    """Two tasks of three and five rows, both ways: what ``test`` returned, its summary, its predictions."""
    root = tmp_path_factory.mktemp("results")
    rows = sample_rows("test")
    (root / "hard.json").write_text(json.dumps(rows[:3]))
    (root / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:8]))
    data = tiny_data(
        tiny_backbone, test=[str(root / "hard.json"), str(root / "easy.jsonl")], evaluate_by=["generation", "likelihood"]
    )
    data.read_answer = read_oddly
    module = tiny_module(tiny_backbone, update="lora", gate="static")
    module.decoding.max_new_tokens = 5
    trainer = tiny_trainer(root, EvaluationReport(str(root / "folder")))
    (metrics, *more) = trainer.test(module, datamodule=data, verbose=False)
    for part in more:
        metrics |= part
    lines = [json.loads(line) for line in (root / "folder" / "predictions.jsonl").read_text().splitlines()]
    return metrics, json.loads((root / "folder" / "test_results.json").read_text()), lines


def accuracy(lines, measure):
    chosen = [
        line["generation"]["choice"] if measure == "generation" else line["likelihood"]["choice"][measure] for line in lines
    ]
    return sum(choice == line["gold"] for choice, line in zip(chosen, lines, strict=True)) / len(lines)


def test_the_summary_equals_a_count_over_the_predictions(recorded):
    metrics, summary, lines = recorded
    assert [line["task"] for line in lines] == ["easy"] * 5 + ["hard"] * 3
    assert sorted(line["example"] for line in lines) == list(range(8))
    assert (summary["rows"], summary["rows_of_split"]) == (8, 8)
    assert list(summary["tasks"]) == ["easy", "hard"]
    for measure in (*SCORES, "generation"):
        values = []
        for task, n in (("easy", 5), ("hard", 3)):
            found = summary["tasks"][task][measure]
            values.append(accuracy([line for line in lines if line["task"] == task], measure))
            assert (found["n"], found["accuracy"]) == (n, values[-1])
            assert found["interval"] == pytest.approx(Proportion(round(values[-1] * n), n).interval)
        average = summary["average"][measure]
        assert average["accuracy"] == pytest.approx(sum(values) / 2)
        assert 0 <= average["interval"][0] <= average["accuracy"] <= average["interval"][1] <= 1
        assert metrics[f"test/accuracy_{measure}"] == pytest.approx(average["accuracy"])
    nats = -sum(line["likelihood"]["log_likelihoods"][line["gold"]] for line in lines)
    tokens = sum(line["likelihood"]["tokens"][line["gold"]] for line in lines)
    assert summary["nats_per_target_token"] == pytest.approx(nats / tokens)
    assert metrics["test/loss"] == pytest.approx(nats / tokens)


def test_each_text_is_read_with_the_options_of_its_own_question(recorded):
    _, _, lines = recorded
    questions = [PlainQuestion.of(row) for row in sample_rows("test")[:8]]
    assert len({len("".join(question.answers)) for question in questions}) > 4
    for line in lines:
        options = [answer.strip() for answer in questions[line["example"]].answers]
        assert line["generation"]["choice"] == read_oddly(line["generation"]["text"], options).choice
        assert line["gold"] == questions[line["example"]].gold


def test_texts_without_an_answer_are_counted_by_task(recorded):
    _, summary, lines = recorded
    for task in ("easy", "hard"):
        none = sum(line["generation"]["choice"] is None for line in lines if line["task"] == task)
        assert summary["tasks"][task]["generation"]["unanswered"] == none
    assert 0 < sum(line["generation"]["choice"] is None for line in lines) < 8


def test_the_summary_says_of_what_and_by_what(recorded, tiny_backbone):
    _, summary, _ = recorded
    assert summary["model"]["backbone"]["id"] == str(tiny_backbone)
    assert {name: summary["model"]["adapter"][name] for name in ("update", "gate", "rank")} == {
        "update": "lora", "gate": "static", "rank": 4
    }  # fmt: skip
    assert summary["model"]["decoding"] == {"beams": 1, "max_new_tokens": 5, "use_cache": True}
    assert (summary["data"]["template"], summary["data"]["eval_batch_size"]) == ("plain", 5)
    assert summary["versions"] == {
        name: importlib.metadata.version(name) for name in ("gatera-lightning", "torch", "lightning", "transformers")
    }
    assert isinstance(summary["seed"], int)
    assert 0 < summary["wall_seconds"] < math.inf
    assert (summary["resumed_predictions"], summary["computed_predictions"]) == (0, 16)
    assert (len(summary["identity"]["data"]), len(summary["identity"]["adapter"])) == (16, 64)
    assert summary["identity"]["dtype"] == "float32"


def test_a_single_candidate_is_no_question():
    """It always ranks first: a math solution has a likelihood, and no accuracy by it."""
    likelihood = {"log_likelihoods": [-3.0], "tokens": [2], "characters": [9], "choice": dict.fromkeys(get_args(Score), 0)}
    row = {"task": "sums", "example": 0, "key": "k", "gold": 0, "likelihood": likelihood}
    result = EvaluationResult([row], expected=1)
    assert (result.measures, result.gold_loss) == ([], 1.5)
    result = EvaluationResult([row | {"generation": {"text": "4", "answer": "4", "choice": 0}}], expected=1)
    assert result.measures == ["generation"]
    assert (result.accuracy("sum").n, result.accuracy("generation").n) == (0, 1)
