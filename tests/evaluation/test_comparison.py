"""Comparison of runs: pairing by question, accuracies, losses and text metrics."""

import math

import numpy as np
import pytest
import sacrebleu
from recorded_runs import example_line, random_text_lines, solution_line, text_line, without

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.comparison import common_examples, compare_runs
from gatera_lightning.evaluation.intervals import Proportion
from gatera_lightning.evaluation.paired_tests import PairedOutcomes
from gatera_lightning.evaluation.recorded_example import MEASURES
from gatera_lightning.evaluation.recorded_run import read_run

SUMMED, PER_TOKEN, PER_CHARACTER, GENERATED = MEASURES


def outcomes_of(pair):
    return {(found.measure, found.task): found.outcomes for found in pair.accuracies if found.outcomes}


# --- accuracies ---------------------------------------------------------------------------------------------


def test_compare_runs_counts_outcomes_by_measure(compare):
    first = [
        example_line(example=i, choice=(1, 0, 1), generated=chosen)
        for i, chosen in enumerate([1, 1, None, 0, 2])
    ]
    second = [
        example_line(example=i, choice=(1, 1, 0), generated=chosen)
        for i, chosen in enumerate([1, None, 1, 1, None])
    ]
    result = compare(first, second)
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
        (GENERATED, "arc"): PairedOutcomes(1, 1, 2, 1),  # a text without an answer is wrong, in both runs
    }


def test_compare_runs_weights_tasks_equally(compare):
    first = [example_line("a", i, choice=0) for i in range(30)] + [example_line("b", i) for i in range(10)]
    second = [example_line("a", i, choice=int(i < 15)) for i in range(30)]
    second += [example_line("b", i, choice=int(i < 9)) for i in range(10)]
    result = compare(first, second)
    average = result.runs[1].average(SUMMED, ["a", "b"])
    (low_a, high_a), (low_b, high_b) = Proportion(15, 30).interval, Proportion(9, 10).interval
    assert average.value == pytest.approx((0.5 + 0.9) / 2)
    assert average.interval == pytest.approx(
        (0.7 - math.hypot(0.5 - low_a, 0.9 - low_b) / 2, 0.7 + math.hypot(high_a - 0.5, high_b - 0.9) / 2)
    )
    macro = next(a for a in result.pairs[0].accuracies if a.task is None and a.measure == SUMMED)
    assert macro.difference.value == pytest.approx((0.5 - 0.1) / 2)


def test_compare_runs_omits_average_of_single_task(compare):
    result = compare(*[[example_line(example=i) for i in range(30)]] * 2)
    assert all(found.task == "arc" for found in result.pairs[0].accuracies)


def test_compare_runs_ignores_single_candidates_in_accuracies(compare):
    def lines(correct):
        several = [example_line(example=i, choice=int(i in correct)) for i in range(4)]
        return [*several, solution_line(9, 2.0, task="arc"), solution_line(3, 2.0)]

    result = compare(lines({0, 1}), lines({1, 2, 3}))
    assert [run.accuracies[SUMMED] for run in result.runs] == [
        {"arc": Proportion(2, 4)},
        {"arc": Proportion(3, 4)},
    ]
    assert outcomes_of(result.pairs[0])[SUMMED, "arc"] == PairedOutcomes(1, 1, 2, 0)
    assert (result.pairs[0].common, result.runs[0].gold_tokens) == (6, 4 * 2 + 2 * 3)


# --- pairing ------------------------------------------------------------------------------------------------


def test_common_examples_pairs_by_key(compare, write):
    lines = [example_line(example=i, key=f"q{i}", choice=1 if i % 3 else 0) for i in range(12)]
    shuffled = [fields | {"example": 20 - fields["example"]} for fields in lines[:10]]
    shuffled += [example_line(example=30, key="new")]
    first, second = read_run(write("c", lines)), read_run(write("d", shuffled))
    assert all(a.key == b.key for a, b in common_examples(first, second))
    pair = compare(lines, shuffled).pairs[0]
    assert (pair.common, pair.unpaired) == (10, (2, 1))
    assert outcomes_of(pair)[SUMMED, "arc"] == PairedOutcomes(6, 0, 0, 4)


def test_common_examples_pairs_repeated_questions_in_order(compare):
    first = [
        example_line(example=1, key="q", choice=1),
        example_line(example=2, key="q", choice=0),
        example_line("boolq", 1, "q", choice=0),
    ]
    second = [example_line(example=i, key="q", choice=choice) for i, choice in ((6, 0), (4, 1), (8, 1))]
    pair = compare(first, second).pairs[0]
    assert (pair.common, pair.unpaired) == (
        2,
        (1, 1),
    )  # 1 with 4, and 2 with 6; the same key in another task does not pair
    assert outcomes_of(pair)[SUMMED, "arc"] == PairedOutcomes(1, 0, 0, 1)


def test_compare_runs_uses_measures_of_both_runs(compare):
    both = [example_line(example=i, generated=1) for i in range(30)]
    result = compare(both, [without("likelihood", fields) for fields in both], both)
    assert [(pair.baseline, pair.label) for pair in result.pairs] == [("a", "b"), ("a", "c")]
    assert {measure for measure, _ in outcomes_of(result.pairs[0])} == {GENERATED}
    assert {measure for measure, _ in outcomes_of(result.pairs[1])} == set(MEASURES)
    assert (result.pairs[0].loss, result.runs[1].loss) == (None, None)


def test_pair_result_does_not_depend_on_other_runs(write):
    def lines(k):
        return [
            example_line(task, i, nll=1 + (i * k) % 7, choice=(i * k) % 3) for task in "xy" for i in range(40)
        ]

    a, b, c = (read_run(write(name, lines(k))) for name, k in (("a", 1), ("b", 2), ("c", 3)))
    assert compare_runs([a, c]).pairs[0] == compare_runs([a, b, c]).pairs[1]


# --- losses -------------------------------------------------------------------------------------------------


def test_compare_runs_pools_loss_over_tokens(compare):
    first = [example_line(example=i, nll=1.0 + i, tokens=1 + i % 3) for i in range(30)]
    second = [example_line(example=i, nll=1.5 + i, tokens=1 + i % 3) for i in range(33)]
    result = compare(first, second)
    assert result.runs[0].loss == pytest.approx(sum(1 + i for i in range(30)) / 60)
    assert result.runs[1].gold_tokens == 66
    assert result.pairs[0].loss.value == pytest.approx(30 * 0.5 / 60)


def test_compare_runs_omits_loss_of_other_tokenizer(compare):
    result = compare(*([example_line(example=i, tokens=tokens) for i in range(30)] for tokens in (2, 3)))
    assert (result.pairs[0].loss, result.pairs[0].retokenized) == (None, 30)


def test_compare_runs_compares_single_candidates_by_loss(compare):
    result = compare(*([solution_line(i, nll + i % 3) for i in range(30)] for nll in (2.0, 1.0)))
    assert [run.accuracies for run in result.runs] == [{}, {}]
    assert result.pairs[0].accuracies == ()
    assert result.pairs[0].loss.value == pytest.approx(-1 / 3)


# --- generated texts ----------------------------------------------------------------------------------------


def bootstrap(first, second, seed):
    """Value, interval and p of the difference of two means, one resample at a time."""
    generator, draws = np.random.default_rng(seed), []
    for _ in range(10_000):
        examples = generator.integers(len(first), size=len(first))
        draws.append(second[examples].mean() - first[examples].mean())
    below, above = sum(d <= 1e-12 for d in draws), sum(d >= -1e-12 for d in draws)
    low, high = np.percentile(draws, [2.5, 97.5])
    return second.mean() - first.mean(), low, high, min(1, 2 * (min(below, above) + 1) / 10_001)


@pytest.mark.parametrize("seed", [0, 7])
def test_compare_runs_bootstraps_mean_text_metrics(compare, seed):
    (first, *one), (second, *other) = random_text_lines(1), random_text_lines(2, shift=0.15)
    pair = compare(first, second, seed=seed).pairs[0]
    assert (pair.common, pair.accuracies, pair.loss) == (60, (), None)
    assert list(pair.text_metrics) == ["token_f1", "meteor"]
    for found, before, after in zip(pair.text_metrics.values(), one, other, strict=True):
        expected = pytest.approx(bootstrap(before, after, seed), rel=1e-9)
        assert (found.value, found.low, found.high, found.p) == expected
    verdicts = [found.verdict(higher_is_better=True) for found in pair.text_metrics.values()]
    assert verdicts == ["better", "no difference shown"]


def test_run_result_has_text_metrics_of_all_texts(compare):
    """Words, by hand: i have dog, i have dog, yes; articles are dropped."""
    texts = [("i have a dog", "i have two dogs"), ("I have the dog!", "no i do not"), ("yes", "yes , i do")]
    f1 = (0.5, 0.25, 0.0)
    lines = [text_line(i, *texts[i], token_f1=f1[i]) for i in range(3)]
    run, _ = compare(lines, lines[:2]).runs
    generated, references = zip(*texts, strict=True)
    bleu = sacrebleu.BLEU().corpus_score(generated, [references]).score
    corpus = {"bleu": pytest.approx(bleu), "distinct_1": 4 / 7, "distinct_2": 2 / 4}
    assert run.text_metrics == {"token_f1": 0.25} | corpus
    assert (run.accuracies, run.loss) == ({}, None)


def test_compare_runs_pairs_texts_by_key(compare):
    lines, _, _ = random_text_lines(3)
    shuffled = [fields | {"example": 90 - fields["example"]} for fields in lines[4:]]
    pair = compare(lines, [*shuffled, text_line(95, key="new", token_f1=9.0, meteor=9.0)]).pairs[0]
    assert (pair.common, pair.unpaired) == (56, (4, 1))
    for found in pair.text_metrics.values():
        assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_compare_runs_compares_text_metrics_of_both_runs(compare):
    """A run without METEOR meets one with it, and one that was evaluated by likelihood alone."""
    lines, more = random_text_lines(1)[0], random_text_lines(2)[0]
    for fields in lines:
        del fields["generation"]["scores"]["meteor"]
    ranked = [example_line(fields["task"], fields["example"], gold=0) for fields in lines]
    both = [fields | extra for fields, extra in zip(lines, ranked, strict=True)]
    result = compare(both, both, ranked)
    assert [list(pair.text_metrics) for pair in result.pairs] == [["token_f1"], []]
    assert result.runs[2].text_metrics == {}
    assert result.pairs[1].loss is not None
    assert list(compare(lines, more).pairs[0].text_metrics) == ["token_f1"]
    message = r"has likelihood only, .* has generation only; expected a measure that both have"
    with pytest.raises(ConfigError, match=message):
        compare(lines, ranked)


# --- errors -------------------------------------------------------------------------------------------------


def test_compare_runs_rejects_runs_without_common_questions(write):
    a, b, c = (
        read_run(write(name, [example_line(key=key)]))
        for name, key in (("a", "q"), ("b", "q"), ("c", "other"))
    )
    with pytest.raises(ConfigError, match="given twice"):
        compare_runs([a, b, read_run(a.path.parent / ".." / "a" / "predictions.jsonl")])
    with pytest.raises(ConfigError, match="no example has the task and the key"):
        compare_runs([a, c])
    with pytest.raises(ConfigError, match="at least one other"):
        compare_runs([a])
    generated = read_run(write("e", [without("likelihood", example_line(key="q", generated=1))]))
    message = r"has generation only, .* has likelihood only; expected a measure that both have"
    with pytest.raises(ConfigError, match=message):
        compare_runs([a, generated])


def test_compare_runs_rejects_answers_against_texts(compare):
    answer = without("likelihood", example_line("t", 0, "k", gold=0, generated=0))
    with pytest.raises(ConfigError, match="expected a measure that both have"):
        compare([answer], [text_line(0, task="t", key="k")])


def test_compare_runs_rejects_other_gold(compare):
    message = r"b/predictions.jsonl, line 1: gold is 2; expected 1 .*a/predictions.jsonl, line 1"
    with pytest.raises(ConfigError, match=message):
        compare([example_line(key="q")], [example_line(key="q", gold=2)])


def test_compare_runs_rejects_other_reference(compare):
    message = (
        r"line 1: its reference is 'no'; expected 'yes' as for the same question in .*, line 1 "
        r"\(task 't', key 'k'\)$"
    )
    with pytest.raises(ConfigError, match=message):
        compare(*([text_line(0, "x", reference, "t", "k")] for reference in ("yes", "no")))
