"""Results: figures by hand from a few examples, and from the predictions of a complete run."""

import importlib.metadata
import json
import math
import sys

import pytest
import sacrebleu
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules.answers.options import ParsedAnswer
from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.results import EvaluationResult

SCORES = ("sum", "per_token", "per_character")


def likelihoods(choices=(0, 0, 0), nll=(1.0, 2.0), tokens=(1, 4)):
    """A likelihood record with one candidate per value of ``nll`` and one choice per score."""
    return {
        "log_likelihoods": [-value for value in nll],
        "tokens": list(tokens),
        "characters": [3, 9][: len(nll)],
        "choice": dict(zip(SCORES, choices, strict=True)),
    }


def predicted(task, example, gold, choices=None, generated="none", **likelihood):
    """An example of ``predictions.jsonl``; ``generated`` is the choice of its text, "none" for no text."""
    found = {"task": task, "example": example, "key": f"{task}{example}", "gold": gold}
    if choices is not None:
        found["likelihood"] = likelihoods(choices, **likelihood)
    if generated != "none":
        found["generation"] = {"text": "…", "answer": generated, "choice": generated}
    return found


def with_text(task, example, text, reference, choices=None, **scores):
    """An example whose generated text has a reference, with the scores of the text."""
    generation = {"text": text, "reference": reference, "scores": scores}
    return predicted(task, example, 1, choices) | {"generation": generation}


ANSWERS = [
    predicted("easy", 0, 0, (0, 1, 0), 0),
    predicted("easy", 1, 0, (0, 0, 1), None),
    predicted("easy", 2, 1, (0, 1, 1), 1, nll=(5.0, 7.0), tokens=(2, 3)),
    predicted("hard", 3, 0, (1, 1, 1), None),
]
SINGLE_CANDIDATE = likelihoods(nll=(3.0,), tokens=(2,))


def test_accuracy_counts_correct_choices_by_task():
    result = EvaluationResult(ANSWERS, split_size=4)
    assert result.tasks == ["easy", "hard"]
    assert result.measures == [*SCORES, "generation"]
    counts = [Proportion(2, 3), Proportion(0, 1), Proportion(2, 4), Proportion(0, 0)]
    for measure in result.measures:
        assert [result.accuracy(measure, task) for task in ("easy", "hard", None, "none")] == counts
    other = EvaluationResult(
        [predicted("easy", 0, 1, (1, 0, 0), 0), predicted("easy", 1, 0, (0, 0, 1), 1)], 2
    )
    assert [other.accuracy(measure).hits for measure in other.measures] == [2, 1, 0, 0]


def test_average_weights_tasks_equally():
    result = EvaluationResult(ANSWERS, split_size=4)
    assert result.average("sum") == Average((Proportion(2, 3), Proportion(0, 1)))
    assert result.average("sum").value == pytest.approx(1 / 3)
    assert result.accuracy("sum").value == 0.5


def test_text_without_answer_is_wrong_and_counted():
    result = EvaluationResult(ANSWERS, split_size=4)
    assert [result.unanswered(task) for task in (None, "easy", "hard")] == [2, 1, 1]
    assert result.accuracy("generation") == Proportion(2, 4)
    unanswered = EvaluationResult([predicted("a", 0, 0, generated=None)], 1)
    assert unanswered.accuracy("generation") == Proportion(0, 1)


def test_gold_loss_is_pooled_over_tokens():
    result = EvaluationResult(ANSWERS, split_size=4)
    assert result.gold_loss == pytest.approx((1 + 1 + 7 + 1) / (1 + 1 + 3 + 1))
    assert result.perplexity == pytest.approx(2.718281828459045 ** (10 / 6))
    assert result.summary()["perplexity"] == result.perplexity


def test_summary_has_no_perplexity_beyond_float():
    found = predicted("t", 0, 0) | {"likelihood": likelihoods(nll=(2000.0,), tokens=(2,))}
    summary = EvaluationResult([found], 1).summary()
    assert summary["nats_per_target_token"] == 1000.0
    assert summary["perplexity"] is None


def test_measures_are_those_of_the_predictions():
    generated = EvaluationResult([predicted("a", 0, 0, generated=0)], split_size=1)
    assert (generated.measures, generated.gold_loss) == (["generation"], None)
    assert set(generated.summary()["tasks"]["a"]) == {"generation"}
    ranked = EvaluationResult([predicted("a", 0, 0, (0, 0, 0))], split_size=1)
    assert (ranked.measures, ranked.unanswered()) == (list(SCORES), 0)
    assert set(ranked.summary()["tasks"]["a"]) == set(SCORES)


def test_summary_without_examples():
    summary = EvaluationResult([], split_size=3).summary()
    nothing = {"nats_per_target_token": None, "perplexity": None, "text": {}, "text_skipped": {}}
    assert summary == {"rows": 0, "rows_of_split": 3, "tasks": {}, "average": {}} | nothing


def test_single_candidate_has_loss_but_no_accuracy():
    """It always ranks first, such as the solution of a math problem."""
    found = predicted("sums", 0, 0) | {"likelihood": SINGLE_CANDIDATE}
    result = EvaluationResult([found], split_size=1)
    assert (result.measures, result.gold_loss) == ([], 1.5)
    found |= {"generation": {"text": "4", "answer": "4", "choice": 0}}
    result = EvaluationResult([found], split_size=1)
    assert result.measures == ["generation"]
    assert (result.accuracy("sum").n, result.accuracy("generation").n) == (0, 1)


def test_single_candidates_among_several_are_not_judged():
    single = {"likelihood": SINGLE_CANDIDATE}
    examples = [*ANSWERS[:3], predicted("easy", 8, 0) | single, predicted("sums", 9, 0) | single]
    result = EvaluationResult(examples, split_size=5)
    assert result.accuracy("sum", "easy") == Proportion(2, 3)
    assert result.accuracy("sum", "sums") == Proportion(0, 0)
    assert result.gold_loss == pytest.approx((1 + 1 + 7 + 3 + 3) / (1 + 1 + 3 + 2 + 2))
    summary = result.summary()
    assert summary["tasks"]["sums"]["sum"] == {"n": 0, "accuracy": None, "interval": [None, None]}
    assert summary["average"]["sum"]["accuracy"] == pytest.approx(
        2 / 3
    )  # of the one task that has an accuracy
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


# --- texts with references ----------------------------------------------------------------------------------

TEXTS = [
    with_text(
        "pets",
        0,
        "i have a dog called miso .",
        "i have two dogs . one is called miso .",
        token_f1=0.5,
        meteor=0.25,
    ),
    with_text("pets", 1, "Yes, the dog!", "no , i do not like dogs", token_f1=0.0, meteor=1.0),
    with_text(
        "work", 2, "i am a carpenter at the sea", "i am a carpenter by the sea", token_f1=0.75, meteor=0.5
    ),
    with_text("work", 3, "", "i am retired", token_f1=0.0, meteor=0.0),
]


def bleu(examples):
    pairs = ((found["generation"]["text"], found["generation"]["reference"]) for found in examples)
    texts, references = zip(*pairs, strict=True)
    return sacrebleu.BLEU().corpus_score(texts, [references]).score


def test_text_metrics_are_means_and_corpus_metrics():
    """Words, by hand: i have dog called miso, yes dog, i am carpenter at sea, and none."""
    result = EvaluationResult(TEXTS, split_size=4)
    for task, texts, f1, meteor, distinct_1, distinct_2 in (
        ("pets", TEXTS[:2], 0.25, 0.625, 6 / 7, 5 / 5),
        ("work", TEXTS[2:], 0.375, 0.25, 5 / 5, 4 / 4),
        (None, TEXTS, 0.3125, 0.4375, 10 / 12, 9 / 9),
    ):
        corpus = {"bleu": pytest.approx(bleu(texts)), "distinct_1": distinct_1, "distinct_2": distinct_2}
        assert result.text_metrics(task) == {"token_f1": f1, "meteor": meteor} | corpus
    assert bleu(TEXTS) != pytest.approx((bleu(TEXTS[:2]) + bleu(TEXTS[2:])) / 2)


def test_text_with_reference_is_neither_correct_nor_wrong():
    result = EvaluationResult(TEXTS, split_size=4)
    assert (result.measures, result.unanswered(), result.counts) == ([], 0, {"generation": 4})
    assert (result.gold_loss, result.perplexity) == (None, None)
    assert result.accuracy("generation") == Proportion(0, 0)


def test_summary_has_text_metrics():
    skipped = {"bert_score": "the model is not on this machine"}
    result = EvaluationResult(TEXTS, 4, skipped)
    summary = result.summary()
    assert summary["tasks"] == {task: {"text": result.text_metrics(task)} for task in ("pets", "work")}
    assert (summary["text"], summary["text_skipped"]) == (result.text_metrics(), skipped)
    assert (summary["average"], summary["nats_per_target_token"], summary["perplexity"]) == ({}, None, None)
    assert json.loads(json.dumps(summary)) == summary


def test_ranked_candidates_and_texts_of_the_same_examples():
    """Likelihoods give hits@1; the generated texts have no accuracy."""
    choices = [(1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 0, 1)]
    examples = [
        text | {"likelihood": likelihoods(chosen)} for text, chosen in zip(TEXTS, choices, strict=True)
    ]
    result = EvaluationResult(examples, split_size=4)
    assert result.measures == list(SCORES)
    assert [result.accuracy(score).hits for score in SCORES] == [3, 1, 3]
    assert result.counts == {"likelihood": 4, "generation": 4}
    assert set(result.summary()["tasks"]["pets"]) == {*SCORES, "text"}
    assert result.text_metrics() == EvaluationResult(TEXTS, split_size=4).text_metrics()


def test_text_metrics_ignore_examples_without_text():
    """Such as a limit on the batches leaves."""
    examples = [*TEXTS[:2], predicted("pets", 7, 1, (1, 1, 1))]
    texts = EvaluationResult(TEXTS[:2], split_size=9).text_metrics()
    assert EvaluationResult(examples, split_size=9).text_metrics() == texts
    assert EvaluationResult(examples[2:], split_size=9).text_metrics() == {}


def test_answers_have_no_text_metrics():
    result = EvaluationResult(ANSWERS, split_size=4)
    assert result.text_metrics() == {}
    assert result.summary()["text"] == result.summary()["text_skipped"] == {}
    assert all("text" not in task for task in result.summary()["tasks"].values())


def test_text_metrics_omit_bleu_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    names = {"token_f1", "meteor", "distinct_1", "distinct_2"}
    assert set(EvaluationResult(TEXTS, split_size=4).text_metrics()) == names


# --- complete run -------------------------------------------------------------------------------------------


def parse_oddly(text, labels):
    """Parse an option from most texts, although a random model names none."""
    choice = (None, *range(len(labels)))[sum(map(ord, text + "".join(labels))) % (len(labels) + 1)]
    return ParsedAnswer(None if choice is None else labels[choice], choice)


@pytest.fixture(scope="module")
def recorded(tiny_backbone, tmp_path_factory):
    """Two tasks of three and five examples: logged metrics, summary, and predictions."""
    root = tmp_path_factory.mktemp("results")
    rows = sample_rows("test")
    (root / "hard.json").write_text(json.dumps(rows[:3]))
    (root / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:8]))
    data = tiny_data(
        tiny_backbone,
        test=[str(root / "hard.json"), str(root / "easy.jsonl")],
        evaluate_by=["generation", "likelihood"],
    )
    data.parse_answer = parse_oddly
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


def test_summary_matches_predictions(recorded):
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
    nll = -sum(line["likelihood"]["log_likelihoods"][line["gold"]] for line in lines)
    tokens = sum(line["likelihood"]["tokens"][line["gold"]] for line in lines)
    assert summary["nats_per_target_token"] == pytest.approx(nll / tokens)
    assert metrics["test/loss"] == pytest.approx(nll / tokens)


def test_texts_are_parsed_with_options_of_their_question(recorded):
    _, _, lines = recorded
    questions = [PlainQuestion.of(row) for row in sample_rows("test")[:8]]
    assert len({len("".join(question.answers)) for question in questions}) > 4
    for line in lines:
        options = [answer.strip() for answer in questions[line["example"]].answers]
        assert line["generation"]["choice"] == parse_oddly(line["generation"]["text"], options).choice
        assert line["gold"] == questions[line["example"]].gold


def test_summary_counts_unanswered_by_task(recorded):
    _, summary, lines = recorded
    for task in ("easy", "hard"):
        none = sum(line["generation"]["choice"] is None for line in lines if line["task"] == task)
        assert summary["tasks"][task]["generation"]["unanswered"] == none
    assert 0 < sum(line["generation"]["choice"] is None for line in lines) < 8


def test_summary_records_model_data_and_versions(recorded, tiny_backbone):
    _, summary, _ = recorded
    assert summary["model"]["backbone"]["id"] == str(tiny_backbone)
    method = {"update": "lora", "gate": "static", "rank": 4}
    assert {name: summary["model"]["adapter"][name] for name in method} == method
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
