"""Results: counted by hand from a few rows, and from the predictions on disk for a whole run."""

import importlib.metadata
import json
import math
import sys
from typing import get_args

import pytest
import sacrebleu
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules.answers.options import ParsedAnswer
from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.likelihood_ranking import Score
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
    return found | (
        {}
        if generation == "none"
        else {"generation": {"text": "…", "answer": generation, "choice": generation}}
    )


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
    hits = {
        measure: [result.accuracy(measure, task) for task in ("easy", "hard", None, "none")]
        for measure in result.measures
    }
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


# --- texts that are neither right nor wrong ---


def compared(task, example, text, reference, likelihood=None, **scores):
    """One line of a dialogue: what was written, the reply that was given, and how close they are."""
    found = row(task, example, 1, likelihood) | {
        "generation": {"text": text, "reference": reference, "scores": scores}
    }
    return found


TEXTS = [
    compared(
        "pets",
        0,
        "i have a dog called miso .",
        "i have two dogs . one is called miso .",
        token_f1=0.5,
        meteor=0.25,
    ),
    compared("pets", 1, "Yes, the dog!", "no , i do not like dogs", token_f1=0.0, meteor=1.0),
    compared(
        "work", 2, "i am a carpenter at the sea", "i am a carpenter by the sea", token_f1=0.75, meteor=0.5
    ),
    compared("work", 3, "", "i am retired", token_f1=0.0, meteor=0.0),
]


def bleu(rows):
    texts, references = zip(
        *((row["generation"]["text"], row["generation"]["reference"]) for row in rows), strict=True
    )
    return sacrebleu.BLEU().corpus_score(texts, [references]).score


def test_text_metrics_are_means_over_rows_and_metrics_of_all_texts_together():
    """Words, by hand: i have dog called miso · yes dog · i am carpenter at sea · (nothing)."""
    result = EvaluationResult(TEXTS, expected=4)
    assert result.text_metrics("pets") == {
        "token_f1": 0.25, "meteor": 0.625, "bleu": pytest.approx(bleu(TEXTS[:2])), "distinct_1": 6 / 7, "distinct_2": 5 / 5
    }  # fmt: skip
    assert result.text_metrics("work") == {
        "token_f1": 0.375, "meteor": 0.25, "bleu": pytest.approx(bleu(TEXTS[2:])), "distinct_1": 5 / 5, "distinct_2": 4 / 4
    }  # fmt: skip
    assert result.text_metrics() == {
        "token_f1": 0.3125, "meteor": 0.4375, "bleu": pytest.approx(bleu(TEXTS)), "distinct_1": 10 / 12, "distinct_2": 9 / 9
    }  # fmt: skip
    assert bleu(TEXTS) != pytest.approx((bleu(TEXTS[:2]) + bleu(TEXTS[2:])) / 2)


def test_a_text_with_a_reference_is_neither_right_nor_wrong():
    result = EvaluationResult(TEXTS, expected=4)
    assert (result.measures, result.unanswered(), result.counts) == ([], 0, {"generation": 4})
    assert (result.gold_loss, result.perplexity) == (None, None)
    assert result.accuracy("generation") == Proportion(0, 0)


def test_the_summary_of_texts():
    skipped = {"bert_score": "the model is not on this machine"}
    summary = EvaluationResult(TEXTS, 4, skipped).summary()
    result = EvaluationResult(TEXTS, expected=4)
    assert summary["tasks"] == {task: {"text": result.text_metrics(task)} for task in ("pets", "work")}
    assert (summary["text"], summary["text_skipped"]) == (result.text_metrics(), skipped)
    assert (summary["average"], summary["nats_per_target_token"], summary["perplexity"]) == ({}, None, None)
    assert json.loads(json.dumps(summary)) == summary


def test_ranked_candidates_and_texts_stand_side_by_side():
    """hits@1 of the likelihoods; the generated texts have no accuracy of their own."""
    rows = [text | {"likelihood": row("", 0, 1, choice)["likelihood"]} for text, choice in zip(
        TEXTS, [(1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 0, 1)], strict=True
    )]  # fmt: skip
    result = EvaluationResult(rows, split_size=4)
    assert result.measures == list(SCORES)
    assert [result.accuracy(score).hits for score in SCORES] == [3, 1, 3]
    assert result.counts == {"likelihood": 4, "generation": 4}
    assert set(result.summary()["tasks"]["pets"]) == {*SCORES, "text"}
    assert result.text_metrics() == EvaluationResult(TEXTS, expected=4).text_metrics()


def test_a_limit_leaves_rows_without_a_text():
    rows = [*TEXTS[:2], row("pets", 7, 1, (1, 1, 1))]
    assert (
        EvaluationResult(rows, split_size=9).text_metrics()
        == EvaluationResult(TEXTS[:2], expected=9).text_metrics()
    )
    assert EvaluationResult(rows[2:], expected=9).text_metrics() == {}


def test_judged_texts_have_no_metrics():
    result = EvaluationResult(ROWS, expected=4)
    assert result.text_metrics() == {}
    assert result.summary()["text"] == result.summary()["text_skipped"] == {}
    assert all("text" not in task for task in result.summary()["tasks"].values())


def test_without_its_package_a_metric_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert set(EvaluationResult(TEXTS, expected=4).text_metrics()) == {
        "token_f1",
        "meteor",
        "distinct_1",
        "distinct_2",
    }


def test_perplexity_is_the_exponential_of_the_loss():
    result = EvaluationResult(ROWS, expected=4)
    assert result.perplexity == pytest.approx(2.718281828459045 ** (10 / 6))
    assert result.summary()["perplexity"] == result.perplexity


# --- a whole run ---


def read_oddly(text, labels):
    """An option out of most texts, for a random model states none; it depends on all that is to be read."""
    choice = (None, *range(len(labels)))[sum(map(ord, text + "".join(labels))) % (len(labels) + 1)]
    return ParsedAnswer(None if choice is None else labels[choice], choice)


@pytest.fixture(scope="module")
def recorded(tiny_backbone, tmp_path_factory):
    """Two tasks of three and five rows, both ways: what ``test`` returned, its summary, its predictions."""
    root = tmp_path_factory.mktemp("results")
    rows = sample_rows("test")
    (root / "hard.json").write_text(json.dumps(rows[:3]))
    (root / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:8]))
    data = tiny_data(
        tiny_backbone,
        test=[str(root / "hard.json"), str(root / "easy.jsonl")],
        evaluate_by=["generation", "likelihood"],
    )
    data.parse_answer = read_oddly
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
        line["generation"]["choice"] if measure == "generation" else line["likelihood"]["choice"][measure]
        for line in lines
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
    exact = {
        "prepared": True,
        "skip_below": 0.0,
        "merge_above": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    assert summary["model"]["decoding"] == {"beams": 1, "max_new_tokens": 5, "use_cache": True} | exact
    assert (summary["data"]["template"], summary["data"]["eval_batch_size"]) == ("plain", 5)
    assert summary["versions"] == {
        name: importlib.metadata.version(name)
        for name in ("gatera-lightning", "torch", "lightning", "transformers")
    }
    assert isinstance(summary["seed"], int)
    assert 0 < summary["wall_seconds"] < math.inf
    assert (summary["resumed_predictions"], summary["computed_predictions"]) == (0, 16)
    assert (len(summary["identity"]["data"]), len(summary["identity"]["adapter"])) == (16, 64)
    assert summary["identity"]["dtype"] == "float32"


def test_a_single_candidate_is_no_question():
    """It always ranks first: a math solution has a likelihood, and no accuracy by it."""
    likelihood = {
        "log_likelihoods": [-3.0],
        "tokens": [2],
        "characters": [9],
        "choice": dict.fromkeys(get_args(Score), 0),
    }
    row = {"task": "sums", "example": 0, "key": "k", "gold": 0, "likelihood": likelihood}
    result = EvaluationResult([row], expected=1)
    assert (result.measures, result.gold_loss) == ([], 1.5)
    result = EvaluationResult([row | {"generation": {"text": "4", "answer": "4", "choice": 0}}], expected=1)
    assert result.measures == ["generation"]
    assert (result.accuracy("sum").n, result.accuracy("generation").n) == (0, 1)


def test_where_some_rows_have_one_candidate_the_others_are_judged():
    alone = {
        "log_likelihoods": [-3.0],
        "tokens": [2],
        "characters": [9],
        "choice": dict.fromkeys(get_args(Score), 0),
    }
    rows = [*ROWS[:3], row("easy", 8, 0) | {"likelihood": alone}, row("sums", 9, 0) | {"likelihood": alone}]
    result = EvaluationResult(rows, split_size=5)
    assert result.accuracy("sum", "easy") == Proportion(2, 3)
    assert result.accuracy("sum", "sums") == Proportion(0, 0)
    assert result.gold_loss == pytest.approx((1 + 1 + 7 + 3 + 3) / (1 + 1 + 3 + 2 + 2))
    summary = result.summary()
    assert summary["tasks"]["sums"]["sum"] == {"n": 0, "accuracy": None, "interval": [None, None]}
    assert summary["average"]["sum"]["accuracy"] == pytest.approx(2 / 3)  # of the one task that has one
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_model_that_is_sure_of_the_wrong_tokens_has_a_perplexity():
    likelihood = {"log_likelihoods": [-2000.0], "tokens": [2], "characters": [3], "choice": {}}
    summary = EvaluationResult(
        [{"task": "t", "example": 0, "gold": 0, "likelihood": likelihood}], 1
    ).summary()
    assert summary["nats_per_target_token"] == 1000.0
    assert summary["perplexity"] is None
