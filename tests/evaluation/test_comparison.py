"""Recorded runs: read strictly, paired by question, compared with counts made by hand, and written for people and programs."""

import json
import math

import numpy as np
import pytest
import sacrebleu

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.comparison import common_rows, compare_runs
from gatera_lightning.evaluation.comparison_report import as_json, as_markdown
from gatera_lightning.evaluation.intervals import Proportion
from gatera_lightning.evaluation.paired_tests import PairedOutcomes
from gatera_lightning.evaluation.recorded_run import MEASURES, labels, read_run

SUMMED, PER_TOKEN, PER_CHARACTER, GENERATED = MEASURES


def row(task="arc", example=0, key=None, gold=1, choice=1, nats=2.0, tokens=2, generated="none"):
    """One line with three candidates; ``choice`` one for all scores or one each; ``generated`` is left out if "none"."""
    choices = (choice,) * 3 if isinstance(choice, int) else choice
    likelihood = {
        "log_likelihoods": [-nats if i == gold else -9.0 for i in range(3)],
        "tokens": [tokens if i == gold else 9 for i in range(3)],
        "characters": [8, 12, 9],
        "choice": dict(zip(("sum", "per_token", "per_character"), choices, strict=True)),
    }
    fields = {
        "task": task,
        "example": example,
        "key": key or f"{task}-{example}",
        "gold": gold,
        "likelihood": likelihood,
    }
    return (
        fields if generated == "none" else fields | {"generation": {"text": "so it is", "choice": generated}}
    )


@pytest.fixture
def write(tmp_path):
    def write(name, rows, adapter=None, file="predictions.jsonl"):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(
            "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
        )
        if adapter is not None:
            (folder / "test_results.json").write_text(json.dumps({"model": {"adapter": adapter}, "seed": 0}))
        return folder if file == "predictions.jsonl" else folder / file

    return write


def outcomes_of(pair):
    return {(a.measure, a.task): a.outcomes for a in pair.accuracies if a.outcomes}


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_made_by_hand(write):
    first = [row(example=i, choice=(1, 0, 1), generated=g) for i, g in enumerate([1, 1, None, 0, 2])]
    second = [row(example=i, choice=(1, 1, 0), generated=g) for i, g in enumerate([1, None, 1, 1, None])]
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))])
    assert [run.accuracies for run in result.runs] == [
        {SUMMED: {"arc": Proportion(5, 5)}, PER_TOKEN: {"arc": Proportion(0, 5)}}
        | {PER_CHARACTER: {"arc": Proportion(5, 5)}, GENERATED: {"arc": Proportion(2, 5)}},
        {SUMMED: {"arc": Proportion(5, 5)}, PER_TOKEN: {"arc": Proportion(5, 5)}}
        | {PER_CHARACTER: {"arc": Proportion(0, 5)}, GENERATED: {"arc": Proportion(3, 5)}},
    ]
    assert outcomes_of(result.pairs[0]) == {
        (SUMMED, "arc"): PairedOutcomes(5, 0, 0, 0),
        (PER_TOKEN, "arc"): PairedOutcomes(0, 0, 5, 0),
        (PER_CHARACTER, "arc"): PairedOutcomes(0, 5, 0, 0),
        (GENERATED, "arc"): PairedOutcomes(1, 1, 2, 1),  # no answer found is a wrong one, in both runs
    }


def test_rows_pair_by_question_not_by_place(write):
    rows = [row(example=i, key=f"q{i}", choice=1 if i % 3 else 0, gold=1) for i in range(12)]
    shuffled = [r | {"example": 20 - r["example"]} for r in rows[:10]] + [row(example=30, key="new")]
    first, second = read_run(write("a", rows)), read_run(write("b", shuffled))
    assert all(a.key == b.key for a, b in common_rows(first, second))
    pair = compare_runs([first, second]).pairs[0]
    assert (pair.common, pair.alone) == (10, (2, 1))
    assert outcomes_of(pair)[SUMMED, "arc"] == PairedOutcomes(6, 0, 0, 4)


def test_a_question_asked_twice_pairs_in_order(write):
    first = [
        row(example=1, key="q", choice=1),
        row(example=2, key="q", choice=0),
        row("boolq", 1, "q", choice=0),
    ]
    second = [
        row(example=6, key="q", choice=0),
        row(example=4, key="q", choice=1),
        row(example=8, key="q", choice=1),
    ]
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))]).pairs[0]
    assert (result.common, result.alone) == (
        2,
        (1, 1),
    )  # by example: 1 with 4 and 2 with 6; of another task: none
    assert outcomes_of(result)[SUMMED, "arc"] == PairedOutcomes(1, 0, 0, 1)


def test_average_over_tasks_weighs_tasks_alike(write):
    first = [row("a", i, choice=0) for i in range(30)] + [row("b", i) for i in range(10)]
    second = [row("a", i, choice=int(i < 15)) for i in range(30)] + [
        row("b", i, choice=int(i < 9)) for i in range(10)
    ]
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))])
    average = result.runs[1].average(SUMMED, ["a", "b"])
    (low_a, high_a), (low_b, high_b) = Proportion(15, 30).interval, Proportion(9, 10).interval
    assert average.value == pytest.approx((0.5 + 0.9) / 2)
    assert average.interval == pytest.approx(
        (0.7 - math.hypot(0.5 - low_a, 0.9 - low_b) / 2, 0.7 + math.hypot(high_a - 0.5, high_b - 0.9) / 2)
    )
    macro = next(a for a in result.pairs[0].accuracies if a.task is None and a.measure == SUMMED)
    assert macro.difference.value == pytest.approx((0.5 - 0.1) / 2)


def test_a_single_task_has_no_average(write):
    result = compare_runs([read_run(write(name, [row(example=i) for i in range(30)])) for name in "ab"])
    assert all(a.task == "arc" for a in result.pairs[0].accuracies)
    assert "average" not in as_markdown(result).partition("- Brackets")[0]


def test_losses_pool_tokens_on_common_rows(write):
    first = [row(example=i, nats=1.0 + i, tokens=1 + i % 3) for i in range(30)]
    second = [row(example=i, nats=1.5 + i, tokens=1 + i % 3) for i in range(33)]
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))])
    assert result.runs[0].loss == pytest.approx(sum(1 + i for i in range(30)) / 60)
    assert result.runs[1].tokens == 66
    assert result.pairs[0].loss.value == pytest.approx(30 * 0.5 / 60)
    assert "| worse |" in as_markdown(result)
    assert json.loads(as_json(result))["pairs"][0]["nats_per_token"]["verdict"] == "worse"


def test_losses_of_another_tokenizer_are_not_compared(write):
    first, second = ([row(example=i, tokens=t) for i in range(30)] for t in (2, 3))
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))])
    assert (result.pairs[0].loss, result.pairs[0].retokenized) == (None, 30)
    assert "30 of 30 common right answers have another number of tokens" in as_markdown(result)
    assert "not comparable" in as_markdown(result)


def test_every_run_meets_the_first_and_measures_that_both_have(write):
    both = [row(example=i, generated=1) for i in range(30)]
    generated_only = [{k: v for k, v in r.items() if k != "likelihood"} for r in both]
    runs = [read_run(write("a", both)), read_run(write("b", generated_only)), read_run(write("c", both))]
    result = compare_runs(runs)
    assert [(pair.baseline, pair.label) for pair in result.pairs] == [("a", "b"), ("a", "c")]
    assert {measure for measure, _ in outcomes_of(result.pairs[0])} == {GENERATED}
    assert {measure for measure, _ in outcomes_of(result.pairs[1])} == set(MEASURES)
    assert (result.pairs[0].loss, result.runs[1].loss) == (None, None)


def test_a_pair_does_not_depend_on_the_other_runs(write):
    a, b, c = (
        read_run(
            write(
                name, [row(t, i, nats=1 + (i * k) % 7, choice=(i * k) % 3) for t in "xy" for i in range(40)]
            )
        )
        for name, k in (("a", 1), ("b", 2), ("c", 3))
    )
    assert compare_runs([a, c]).pairs[0] == compare_runs([a, b, c]).pairs[1]


# --- names -----------------------------------------------------------------------------------------------------------


def test_labels_are_methods_then_folders_then_as_much_path_as_it_takes(write):
    gatera, hira = {"update": "hira", "gate": "token"}, {"update": "hira", "gate": "none"}

    def names(*places):
        return labels([read_run(write(place, [row()], adapter)) for place, adapter in places])

    assert names(("p/v0", gatera), ("q/v0", hira)) == ["hira × token", "hira × none"]
    assert names(("r/v0", gatera), ("s/v1", gatera), ("t/v0", hira)) == [
        "hira × token (r/v0)",
        "hira × token (s/v1)",
        "hira × none",
    ]
    assert names(("u/one", None), ("u/two", None)) == ["one", "two"]
    assert names(("v/x", None), ("w/x", None), ("w/y", {"update": 3})) == ["v/x", "w/x", "y"]


def test_files_of_one_folder_are_runs_of_their_own(write):
    write("f", [row()], {"update": "hira", "gate": "token"})
    one, two = (read_run(write("f", [row()], file=name)) for name in ("one.jsonl", "two.jsonl"))
    assert labels([one, two]) == ["one.jsonl", "two.jsonl"]


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(write):
    first = [
        row(t, i, choice=int(i < 20), nats=1 + i % 5, generated=1) for t in ("arc", "b|q") for i in range(40)
    ]
    second = [
        row(t, i, choice=int(i < 32), nats=1 + i % 5, generated=None)
        for t in ("arc", "b|q")
        for i in range(40)
    ]
    third = [row("arc", i, choice=1) for i in range(50)]
    adapters = (
        {"update": "hira", "gate": "none"},
        {"update": "hira", "gate": "token"},
        {"update": "lora", "gate": "none"},
    )
    runs = zip("abc", (first, second, third), adapters, strict=True)
    return compare_runs([read_run(write(name, rows, adapter)) for name, rows, adapter in runs])


def test_markdown(comparison):
    text = as_markdown(comparison)
    accuracy = str(Proportion(20, 40)), str(Proportion(32, 40)), str(Proportion(50, 50))
    assert f"| {SUMMED} | arc | 40 / 40 / 50 | {accuracy[0]} | {accuracy[1]} | {accuracy[2]} |" in text
    assert f"| {SUMMED} | b\\|q | 40 | {accuracy[0]} | {accuracy[1]} | – |" in text
    assert "| generation | average of 2 tasks |  | 1.000 [0.938, 1.000] | 0.000 [0.000, 0.062] | – |" in text
    low, high = PairedOutcomes(20, 0, 12, 8).interval
    assert f"| {SUMMED} | arc | +0.300 [{low:+.3f}, {high:+.3f}] | 0 / 12 | 0.0002 | better |" in text
    assert "| 40 / 0 | <0.0001 | worse |" in text
    assert "## hira × token minus hira × none" in text
    assert "40 rows are common; hira × none has 40 more, lora × none 10 more." in text
    assert (
        "| hira × token | 160 | 1.5000 | +0.0000 [+0.0000, +0.0000] | 1.0000 | no difference shown |" in text
    )
    assert "not corrected for the number of comparisons" in text
    assert "says nothing about seeds" in text
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {7}  # every table has six columns


def test_an_average_of_shared_tasks_says_so(write):
    two, three = ([row(t, i) for t in tasks for i in range(12)] for tasks in ("xy", "xyz"))
    text = as_markdown(compare_runs([read_run(write("a", two)), read_run(write("b", three))]))
    assert "average of the 2 shared tasks" in text


def test_what_was_evaluated_otherwise_is_named(write, tmp_path):
    """Method and adapter are what runs are compared for; everything else that differs is no difference of theirs."""
    identity = {
        "format": 2, "backbone": "f970", "adapter": "e8f9", "method": {"update": "hira"}, "data": "5756", "dtype": "float32",
        "decoding": {"beams": 1, "max_new_tokens": 32},
    }  # fmt: skip
    other = identity | {"adapter": "0000", "method": {"update": "lora"}}
    changed = {"dtype": "bfloat16", "decoding": {"beams": 4, "max_new_tokens": 32}, "bert_score": "roberta"}
    places = [write(name, [row(example=i) for i in range(3)]) for name in "abc"]
    for place, found in zip(places, (identity, other, other | changed), strict=True):
        (place / "evaluation.json").write_text(json.dumps(found))
    found = compare_runs([read_run(place) for place in places])
    assert [pair.settings for pair in found.pairs] == [
        {},
        {
            "bert_score": ("null", '"roberta"'),
            "decoding.beams": ("1", "4"),
            "dtype": ('"float32"', '"bfloat16"'),
        },
    ]
    text = as_markdown(found)
    assert text.count("**Evaluated otherwise**") == 1
    assert (
        'bert_score null against "roberta"; decoding.beams 1 against 4; dtype "float32" against "bfloat16".'
        in text
    )
    assert json.loads(as_json(found))["pairs"][1]["evaluated_otherwise"]["decoding.beams"] == ["1", "4"]
    (places[2] / "evaluation.json").unlink()
    assert "How they were evaluated was not compared" in as_markdown(
        compare_runs([read_run(p) for p in places[1:]])
    )
    (places[2] / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match=r"evaluation\.json: is not JSON"):
        read_run(places[2])


def test_json_holds_the_same_numbers_and_no_nan(comparison, write):
    found = json.loads(as_json(comparison))
    first, pair = found["runs"][0], found["pairs"][0]
    assert first["accuracy"][SUMMED]["tasks"]["arc"]["hits"] == 20
    assert first["accuracy"][SUMMED]["average"] is None  # one run has one of the tasks only
    assert first["accuracy"]["generation"]["average"]["value"] == 1.0
    assert first["accuracy"]["generation"]["average"]["tasks"] == ["arc", "b|q"]
    assert (
        found["pairs"][1]["common"],
        found["pairs"][1]["only_baseline"],
        found["pairs"][1]["only_run"],
    ) == (40, 40, 10)
    entry = pair["accuracy"][0]
    assert entry["outcomes"] == {"both": 20, "only_first": 0, "only_second": 12, "neither": 8}
    assert (entry["value"], entry["verdict"], entry["p"]) == (pytest.approx(0.3), "better", 2**-12)
    assert pair["nats_per_token"]["verdict"] == "no difference shown"
    few = compare_runs([read_run(write(name, [row()])) for name in ("d", "e")])
    assert json.loads(as_json(few))["pairs"][0]["nats_per_token"]["p"] is None
    assert "| +0.0000 [–, –] | – | too few rows |" in as_markdown(few)


# --- generated texts -------------------------------------------------------------------------------------------------


def text_row(example, text="i have a dog", reference="i have two dogs", task="talk", key=None, **scores):
    """One line of a dialogue that was generated, with the ``scores`` of its text."""
    fields = {"task": task, "example": example, "key": key or f"{task}-{example}", "gold": 0}
    return fields | {
        "generation": {"text": text, "reference": reference, "scores": scores or {"token_f1": 0.5}}
    }


def scored(seed, n=60, shift=0.0):
    """Rows of two tasks whose F1 and METEOR are drawn, and the two as arrays in the order of the rows."""
    generator = np.random.default_rng(seed)
    f1, meteor = generator.random(n) / 2 + shift, generator.random(n)
    rows = [
        text_row(
            i,
            f"text {i} of {seed}",
            f"the text {i} of all",
            f"t{i % 2}",
            token_f1=float(f1[i]),
            meteor=float(meteor[i]),
        )
        for i in range(n)
    ]
    order = [*range(0, n, 2), *range(1, n, 2)]
    return rows, f1[order], meteor[order]


def bootstrap(first, second, seed):
    """Value, interval and p of the difference of two means: a resample of pairs at a time."""
    generator, draws = np.random.default_rng(seed), []
    for _ in range(10_000):
        rows = generator.integers(len(first), size=len(first))
        draws.append(second[rows].mean() - first[rows].mean())
    below, above = sum(d <= 1e-12 for d in draws), sum(d >= -1e-12 for d in draws)
    low, high = np.percentile(draws, [2.5, 97.5])
    return second.mean() - first.mean(), low, high, min(1, 2 * (min(below, above) + 1) / 10_001)


@pytest.mark.parametrize("seed", [0, 7])
def test_means_of_text_metrics_are_compared_in_pairs(write, seed):
    (first, f1, meteor), (second, more_f1, other_meteor) = scored(1), scored(2, shift=0.15)
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))], seed=seed)
    pair = result.pairs[0]
    assert (pair.common, pair.accuracies, pair.loss) == (60, (), None)
    assert list(pair.texts) == ["token_f1", "meteor"]
    for metric, one, other in (("token_f1", f1, more_f1), ("meteor", meteor, other_meteor)):
        found = pair.texts[metric]
        assert (found.value, found.low, found.high, found.p) == pytest.approx(
            bootstrap(one, other, seed), rel=1e-9
        )
    assert [pair.texts[metric].verdict(higher_is_better=True) for metric in pair.texts] == [
        "better",
        "no difference shown",
    ]
    assert f"| F1 | b | {more_f1.mean():.3f} | {more_f1.mean() - f1.mean():+.3f} [" in as_markdown(result)


def test_a_runs_text_metrics_are_of_all_its_texts(write):
    """Words, by hand: i have dog · i have dog · yes; the article counts for nothing."""
    texts = [("i have a dog", "i have two dogs"), ("I have the dog!", "no i do not"), ("yes", "yes , i do")]
    rows = [
        text_row(i, *pair, token_f1=f1)
        for i, (pair, f1) in enumerate(zip(texts, (0.5, 0.25, 0.0), strict=True))
    ]
    run, _ = compare_runs([read_run(write("a", rows)), read_run(write("b", rows[:2]))]).runs
    bleu = (
        sacrebleu.BLEU()
        .corpus_score([text for text, _ in texts], [[reference for _, reference in texts]])
        .score
    )
    assert run.texts == {
        "token_f1": 0.25,
        "bleu": pytest.approx(bleu),
        "distinct_1": 4 / 7,
        "distinct_2": 2 / 4,
    }
    assert (run.accuracies, run.loss) == ({}, None)


def test_texts_pair_by_question_not_by_place(write):
    rows, _, _ = scored(3)
    shuffled = [fields | {"example": 90 - fields["example"]} for fields in rows[4:]]
    more = text_row(95, key="new", token_f1=9.0, meteor=9.0)
    pair = compare_runs([read_run(write("a", rows)), read_run(write("b", [*shuffled, more]))]).pairs[0]
    assert (pair.common, pair.alone) == (56, (4, 1))
    for found in pair.texts.values():
        assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_only_metrics_that_both_runs_have_are_compared(write):
    """METEOR came to the second machine later, and nothing was generated where the third run was made."""
    (rows, _, _), (more, _, meteor) = scored(1), scored(2)
    for fields in rows:
        del fields["generation"]["scores"]["meteor"]
    ranked = [row(fields["task"], fields["example"], gold=0) for fields in rows]
    both = [fields | extra for fields, extra in zip(rows, ranked, strict=True)]
    result = compare_runs(
        [read_run(write(name, lines)) for name, lines in (("a", both), ("b", both), ("c", ranked))]
    )
    assert [list(pair.texts) for pair in result.pairs] == [["token_f1"], []]
    assert result.runs[2].texts == {}
    assert result.pairs[1].loss is not None
    result = compare_runs([read_run(write(name, lines)) for name, lines in (("d", rows), ("e", more))])
    assert list(result.pairs[0].texts) == ["token_f1"]
    text = as_markdown(result)
    assert f"| METEOR | e | {meteor.mean():.3f} |  |  | not tested |" in text
    assert "METEOR | d" not in text
    with pytest.raises(
        ConfigError, match=r"has likelihood only, .* has generation only; expected a measure that both have"
    ):
        compare_runs([read_run(write("f", rows)), read_run(write("g", ranked))])


def test_markdown_and_json_say_the_same_of_texts(write):
    runs = [
        read_run(write(name, scored(seed, shift=shift)[0]))
        for name, seed, shift in (("a", 1, 0), ("b", 2, 0.2), ("c", 3, 0))
    ]
    comparison = compare_runs(runs)
    found = json.loads(as_json(comparison))
    text = (
        as_markdown(comparison)
        .partition("## Generated texts against their references\n\n")[2]
        .partition("\n\n")[0]
    )
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert head == ["metric", "run", "value", "difference on common rows", "p", "verdict"]
    names = {
        "F1": "token_f1",
        "METEOR": "meteor",
        "BLEU": "bleu",
        "distinct-1": "distinct_1",
        "distinct-2": "distinct_2",
    }
    assert [(line[0], line[1]) for line in lines] == [(label, run) for label in names for run in "abc"]
    for label, run, value, *tested in lines:
        number, metric = "abc".index(run), names[label]
        assert value == f"{found['runs'][number]['text'][metric]:.3f}"
        pair = found["pairs"][number - 1]["text"] if number else {}
        if number == 0:
            assert tested == ["", "", "baseline"]
        elif metric in pair:
            numbers = pair[metric]
            difference = f"{numbers['value']:+.3f} [{numbers['low']:+.3f}, {numbers['high']:+.3f}]"
            p = f"{numbers['p']:.4f}"
            assert tested == [difference, p if p != "0.0000" else "<0.0001", numbers["verdict"]]
        else:
            assert tested == ["", "", "not tested"]
    assert [set(pair["text"]) for pair in found["pairs"]] == [{"token_f1", "meteor"}] * 2
    assert found["pairs"][0]["text"]["token_f1"]["verdict"] == "better"
    assert found["runs"][0]["accuracy"] == {}
    assert "## Accuracy" not in as_markdown(comparison)
    assert "## Nats" not in as_markdown(comparison)


def test_few_texts_have_no_interval(write):
    result = compare_runs([read_run(write(name, scored(1, n=19)[0])) for name in "ab"])
    assert json.loads(as_json(result))["pairs"][0]["text"]["meteor"] == {
        "value": 0.0, "low": None, "high": None, "p": None, "verdict": "too few rows"
    }  # fmt: skip
    assert "| +0.000 [–, –] | – | too few rows |" in as_markdown(result)


BAD_TEXTS = {
    "text": ({"text": 3}, "generation: text is 3; expected a text"),
    "reference null": ({"reference": None}, "generation: reference is None; expected a text"),
    "no scores": (
        {"scores": None},
        "generation: scores is None; expected finite numbers by the metric's name",
    ),
    "scores by place": ({"scores": [0.5]}, "generation: scores is [0.5]; expected finite numbers"),
    "a text for a score": ({"scores": {"token_f1": "0.5"}}, "generation: scores is {'token_f1': '0.5'}"),
    "true is no score": ({"scores": {"token_f1": True}}, "generation: scores is {'token_f1': True}"),
    "NaN": (
        {"scores": {"token_f1": math.nan}},
        "generation: scores is {'token_f1': nan}; expected finite numbers",
    ),
    "infinite": (
        {"scores": {"token_f1": math.inf}},
        "generation: scores is {'token_f1': inf}; expected finite numbers",
    ),
    "fewer": ({"scores": {}}, "its text has the scores none; expected token_f1 as in line 1"),
    "others": (
        {"scores": {"token_f1": 0.5, "meteor": 0.5}},
        "its text has the scores token_f1, meteor; expected token_f1 as in line 1",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_text_is_named_with_what_is_expected(write, fields, message):
    bad = text_row(8)
    bad["generation"] |= fields
    folder = write("run", [text_row(7), bad])
    with pytest.raises(ConfigError) as caught:
        read_run(folder)
    assert f"{folder / 'predictions.jsonl'}, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_a_text_without_its_scores_or_among_judged_ones_is_refused(write):
    """The first is what a part file holds, the second two evaluations in one file."""
    bare = text_row(7)
    del bare["generation"]["scores"]
    with pytest.raises(ConfigError, match="line 1, generation: misses 'scores'; expected finite numbers"):
        read_run(write("a", [bare]))
    judged = without("likelihood", row(example=8, generated=1))
    with pytest.raises(
        ConfigError, match="line 2: its text has the scores none; expected token_f1 as in line 1"
    ):
        read_run(write("b", [text_row(7), judged]))
    with pytest.raises(
        ConfigError, match="line 2: its text has the scores token_f1; expected none as in line 1"
    ):
        read_run(write("c", [judged, text_row(9)]))


# --- one candidate ---------------------------------------------------------------------------------------------------


def solution(example, nats, tokens=3, task="sums"):
    """One line of a math run by likelihood: the solution alone, which ranks first among one."""
    likelihood = {"log_likelihoods": [-nats], "tokens": [tokens], "characters": [9]}
    likelihood["choice"] = dict.fromkeys(("sum", "per_token", "per_character"), 0)
    return {"task": task, "example": example, "key": f"{task}-{example}", "gold": 0, "likelihood": likelihood}


def test_rows_of_one_candidate_compare_by_nats_alone(write):
    first = [solution(i, 2.0 + i % 3) for i in range(30)]
    second = [solution(i, 1.0 + i % 3) for i in range(30)]
    result = compare_runs([read_run(write("a", first)), read_run(write("b", second))])
    assert [run.accuracies for run in result.runs] == [{}, {}]
    assert result.pairs[0].accuracies == ()
    assert result.pairs[0].loss.value == pytest.approx(-1 / 3)
    text, found = as_markdown(result), json.loads(as_json(result))
    assert "## Accuracy" not in text
    assert "## Generated" not in text
    assert "| b | 90 | 0.6667 | -0.3333 [-0.3333, -0.3333] | 0.0002 | better |" in text
    assert [run["accuracy"] for run in found["runs"]] == [{}, {}]
    assert found["pairs"][0]["accuracy"] == []
    assert found["pairs"][0]["nats_per_token"]["verdict"] == "better"


def test_where_some_rows_have_one_candidate_the_others_are_counted(write):
    def mixed(right):
        return [row(example=i, choice=int(i in right)) for i in range(4)] + [
            solution(9, 2.0, task="arc"),
            solution(3, 2.0),
        ]

    result = compare_runs([read_run(write("a", mixed({0, 1}))), read_run(write("b", mixed({1, 2, 3})))])
    assert [run.accuracies[SUMMED] for run in result.runs] == [
        {"arc": Proportion(2, 4)},
        {"arc": Proportion(3, 4)},
    ]
    assert outcomes_of(result.pairs[0])[SUMMED, "arc"] == PairedOutcomes(1, 1, 2, 0)
    assert (result.pairs[0].common, result.runs[0].tokens) == (6, 4 * 2 + 2 * 3)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def without(name, fields):
    return {k: v for k, v in fields.items() if k != name}


def deep(path, value):
    """A good line with the field at ``path`` replaced."""
    fields = row(generated=1)
    *outer, last = path.split(".")
    place = fields
    for name in outer:
        place = place[name]
    place[last] = value
    return fields


BAD = {
    "not JSON": ("{", "is not JSON"),
    "empty line": ("", "is not JSON"),
    "no object": ("[1]", "expected an object"),
    "no task": (without("task", row()), "misses 'task'; expected a text"),
    "no key": (without("key", row()), "misses 'key'"),
    "empty key": (deep("key", ""), "key is ''; expected a text that is not empty"),
    "no gold": (without("gold", row()), "misses 'gold'"),
    "example": (deep("example", "7"), "example is '7'; expected a whole number"),
    "true is no number": (deep("gold", True), "gold is True"),
    "gold below": (deep("gold", -1), "gold is -1"),
    "gold above": (deep("gold", 3), "gold is 3; expected one of the 3 candidates, 0 to 2"),
    "no measure": (without("likelihood", row()), "has neither likelihood nor generation"),
    "likelihood null": (deep("likelihood", None), "likelihood is None; expected an object"),
    "lengths": (deep("likelihood.tokens", [1, 2]), "tokens is [1, 2]; expected 3 whole numbers"),
    "fractions": (deep("likelihood.characters", [1, 2, 2.5]), "characters is [1, 2, 2.5]"),
    "NaN": (
        deep("likelihood.log_likelihoods", [-1.0, math.nan, 0]),
        "log_likelihoods is [-1.0, nan, 0]; expected a list of finite",
    ),
    "infinite": (
        deep("likelihood.log_likelihoods", [-1.0, -math.inf, 0]),
        "expected a list of finite numbers",
    ),
    "huge": (deep("likelihood.log_likelihoods", [-1.0, 10**400, 0]), "expected a list of finite numbers"),
    "no candidates": (deep("likelihood.log_likelihoods", []), "log_likelihoods is []"),
    "choice missing": (
        deep("likelihood.choice", {"sum": 1}),
        "likelihood, choice: misses 'per_token'; expected a candidate, 0 to 2",
    ),
    "choice above": (deep("likelihood.choice.sum", 3), "sum is 3; expected a candidate, 0 to 2"),
    "choice null": (deep("likelihood.choice.per_character", None), "per_character is None"),
    "text": (deep("generation.text", None), "generation: text is None; expected a text"),
    "generated": (
        deep("generation.choice", "a"),
        "generation: choice is 'a'; expected a whole number from 0, or null",
    ),
    "twice": (row(example=7, generated=1), "task 'arc', example 7 is line 1 already"),
    "fewer measures": (
        row(generated="none"),
        "has likelihood only; expected likelihood and generation as in line 1",
    ),
    "other measures": (
        without("likelihood", row(generated=1)),
        "has generation only; expected likelihood and generation",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_with_what_is_expected(write, line, message):
    folder = write("run", [row(example=7, generated=1), line])
    with pytest.raises(ConfigError) as caught:
        read_run(folder)
    assert f"{folder / 'predictions.jsonl'}, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_no_text(write):
    folder = write("run", [row()])
    (folder / "predictions.jsonl").write_bytes(b'{"task": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 1: is not JSON"):
        read_run(folder)


def test_text_of_any_script_is_one_line(write):
    odd = row(generated=1)
    odd["generation"]["text"] = "a\u2028b\x85c\rd"
    assert len(read_run(write("run", [json.dumps(odd, ensure_ascii=False)])).rows) == 1


def test_no_predictions_where_they_were_expected(write, tmp_path):
    below = write("runs/x/version_0", [row()])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no predictions.jsonl.*these have: .*version_0") as caught:
        read_run(tmp_path / "runs")
    assert str(below) in str(caught.value)
    with pytest.raises(ConfigError, match="nor has any folder below"):
        read_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(ConfigError, match="is empty"):
        read_run(write("nothing", []))


def test_a_broken_summary(write):
    folder = write("run", [row()])
    (folder / "test_results.json").write_text("{")
    with pytest.raises(ConfigError, match=r"test_results\.json: is not JSON"):
        read_run(folder)


def test_runs_that_cannot_be_compared(write):
    a, b, c = (
        read_run(write(name, [row(key=key)])) for name, key in (("a", "q"), ("b", "q"), ("c", "other"))
    )
    with pytest.raises(ConfigError, match="given twice"):
        compare_runs([a, b, read_run(a.path.parent / ".." / "a" / "predictions.jsonl")])
    with pytest.raises(ConfigError, match="no row has task and key"):
        compare_runs([a, c])
    with pytest.raises(ConfigError, match="at least one other"):
        compare_runs([a])
    with pytest.raises(
        ConfigError, match=r"d/predictions.jsonl, line 1: gold is 2; expected 1 .*a/predictions.jsonl, line 1"
    ):
        compare_runs([a, read_run(write("d", [row(key="q", gold=2)]))])
    generated = read_run(write("e", [without("likelihood", row(key="q", generated=1))]))
    with pytest.raises(
        ConfigError, match=r"has generation only, .* has likelihood only; expected a measure that both have"
    ):
        compare_runs([a, generated])


def test_judged_and_compared_texts_have_no_measure_in_common(tmp_path):
    runs = []
    for name, found in (("a", {"choice": 0}), ("b", {"reference": "y", "scores": {"token_f1": 0.5}})):
        (tmp_path / name).mkdir()
        line = {"task": "t", "example": 0, "key": "k", "gold": 0, "generation": {"text": "x"} | found}
        (tmp_path / name / "predictions.jsonl").write_text(json.dumps(line) + "\n")
        runs.append(read_run(tmp_path / name))
    with pytest.raises(ConfigError, match="expected a measure that both have"):
        compare_runs(runs)


def test_a_reference_that_differs_is_another_question(tmp_path):
    runs = []
    for name, reference in (("a", "yes"), ("b", "no")):
        (tmp_path / name).mkdir()
        generation = {"text": "x", "reference": reference, "scores": {"token_f1": 0.5}}
        line = {"task": "t", "example": 0, "key": "k", "gold": 0, "generation": generation}
        (tmp_path / name / "predictions.jsonl").write_text(json.dumps(line) + "\n")
        runs.append(read_run(tmp_path / name))
    message = r"line 1: its reference is 'no'; expected 'yes' as for the same question in .*, line 1 \(task 't', key 'k'\)$"
    with pytest.raises(ConfigError, match=message):
        compare_runs(runs)
