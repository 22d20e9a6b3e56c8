"""Compare recorded runs: the figures of each one, and paired differences from the first one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from gatera_lightning.errors import ConfigError, checks_arguments
from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.paired_tests import (
    Difference,
    PairedOutcomes,
    holm,
    macro_difference,
    pooled_difference,
)
from gatera_lightning.evaluation.recorded_example import MEASURES, RecordedExample
from gatera_lightning.evaluation.recorded_run import RecordedRun, joined_kinds
from gatera_lightning.evaluation.run_labels import run_labels
from gatera_lightning.evaluation.text_metrics import corpus_metrics

Pairs = Sequence[tuple[RecordedExample, RecordedExample]]


@dataclass(frozen=True)
class RunResult:
    """Figures of one run, over all of its own examples.

    Attributes:
        label: Name of the run, distinct in the comparison.
        path: Its predictions file.
        examples: Number of examples.
        accuracies: Measure -> task -> accuracy.
        gold_nll: Negative log-likelihood of all correct answers together, in nats; None without likelihoods.
        gold_tokens: Number of tokens of all correct answers together; None without likelihoods.
        text_metrics: Metrics of generated texts against their references; empty where there are none.
    """

    label: str
    path: str
    examples: int
    accuracies: dict[str, dict[str, Proportion]]
    gold_nll: float | None
    gold_tokens: int | None
    text_metrics: dict[str, float]

    @property
    def loss(self) -> float | None:
        """Cross-entropy loss of the correct answers in nats per token; None without likelihoods."""
        if self.gold_nll is None or self.gold_tokens is None:
            return None
        return self.gold_nll / max(1, self.gold_tokens)

    def average(self, measure: str, tasks: Sequence[str]) -> Average:
        """Unweighted mean of the accuracies of some tasks."""
        return Average(tuple(self.accuracies[measure][task] for task in tasks))


@dataclass(frozen=True)
class AccuracyDifference:
    """Difference of two runs in the accuracy of a task, or in the average over tasks.

    Attributes:
        measure: How answers are chosen.
        task: The task; None for the average.
        outcomes: Which run is correct how often; None for the average.
        difference: Other run minus baseline.
    """

    measure: str
    task: str | None
    outcomes: PairedOutcomes | None
    difference: Difference


@dataclass(frozen=True)
class PairResult:
    """A run compared with the baseline, on the examples that both have.

    Attributes:
        baseline: Label of the baseline.
        label: Label of the other run.
        common: Number of examples that both runs have.
        unpaired: Number of examples that only the baseline has, and that only the other run has.
        different_settings: Evaluation settings that differ -> (baseline's, other run's); None where a run
            does not record them.
        accuracies: Differences by measure and task.
        loss: Difference of the loss in nats per token; None without likelihoods in both runs, or where
            ``retokenized`` is not 0.
        text_metrics: Differences of the means of text metrics that both runs have.
        retokenized: Number of common examples whose correct answer has another number of tokens in the other
            run. Losses per token cannot be compared then.
    """

    baseline: str
    label: str
    common: int
    unpaired: tuple[int, int]
    different_settings: dict[str, tuple[str, str]] | None
    accuracies: tuple[AccuracyDifference, ...]
    loss: Difference | None
    text_metrics: dict[str, Difference]
    retokenized: int


@dataclass(frozen=True)
class Comparison:
    """Several runs and their differences from the first one, the baseline.

    Attributes:
        runs: Figures of every run, the baseline first.
        pairs: Every other run compared with the baseline.
    """

    runs: tuple[RunResult, ...]
    pairs: tuple[PairResult, ...]

    def shared_tasks(self, measure: str) -> list[str]:
        """Tasks of all runs that have the measure; averages over them can be compared."""
        tasks = [set(run.accuracies[measure]) for run in self.runs if measure in run.accuracies]
        return sorted(set.intersection(*tasks)) if tasks else []


@checks_arguments
def compare_runs(runs: Sequence[RecordedRun], *, seed: int = 0) -> Comparison:
    """Compare the first run with every other one.

    Args:
        runs: The baseline and at least one other run.
        seed: Seed of the bootstrap; every statistic starts from it again, so none depends on the others.

    Raises:
        ConfigError: There are fewer than two runs, a run is given twice, two runs have no examples or
            measures in common, or they disagree about the correct answer or the reference of a question.
    """
    if wrong := [run for run in runs if not isinstance(run, RecordedRun)]:
        raise TypeError(f"compare_runs: {wrong[0]!r:.60} is no run; accepted: what read_run returns")
    if len(runs) < 2:
        raise ConfigError(f"compare: got {len(runs)} run; expected a baseline and at least one other")
    paths = [run.path.resolve() for run in runs]
    if repeated := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise ConfigError([f"{path}: was given twice; expected different runs" for path in repeated])
    labels = run_labels(runs)
    results = tuple(_summarize(run, label) for run, label in zip(runs, labels, strict=True))
    others = zip(runs[1:], labels[1:], strict=True)
    return Comparison(results, tuple(_compare(runs[0], run, labels[0], label, seed) for run, label in others))


def common_examples(first: RecordedRun, second: RecordedRun) -> Pairs:
    """Pair the examples that ask the same question: equal task, key, and occurrence of the key in the task.

    Raises:
        ConfigError: The correct answers or the references of a question differ.
    """
    second_by_question = second.by_question
    pairs = [
        (example, second_by_question[question])
        for question, example in first.by_question.items()
        if question in second_by_question
    ]
    for a, b in pairs:
        same_question = (
            f"as for the same question in {first.path}, line {a.line} (task {a.task!r}, key {a.key!r})"
        )
        if a.gold != b.gold:
            raise ConfigError(
                f"{second.path}, line {b.line}: gold is {b.gold}; expected {a.gold} {same_question}"
            )
        if a.text and b.text and a.text[1] != b.text[1]:
            raise ConfigError(
                f"{second.path}, line {b.line}: its reference is {b.text[1]!r:.60}; "
                f"expected {a.text[1]!r:.60} {same_question}"
            )
    return pairs


def _summarize(run: RecordedRun, label: str) -> RunResult:
    accuracies: dict[str, dict[str, Proportion]] = {measure: {} for measure in run.measures}
    for task, of_task in groupby(run.examples, key=lambda found: found.task):  # examples are sorted by task
        examples = list(of_task)
        for measure in run.measures:
            if judged := [found.is_correct(measure) for found in examples if measure in found.choices]:
                accuracies[measure][task] = Proportion(sum(judged), len(judged))
    scored = [
        (found.gold_nll, found.gold_tokens)
        for found in run.examples
        if found.gold_nll is not None and found.gold_tokens is not None
    ]
    return RunResult(
        label,
        str(run.path),
        len(run.examples),
        accuracies,
        math.fsum(nll for nll, _ in scored) if scored else None,
        sum(tokens for _, tokens in scored) if scored else None,
        _mean_text_metrics(run) | _corpus_metrics(run),
    )


def _mean_text_metrics(run: RecordedRun) -> dict[str, float]:
    return {
        metric: math.fsum(found.scores[metric] for found in run.examples) / len(run.examples)
        for metric in run.text_metrics
    }


def _corpus_metrics(run: RecordedRun) -> dict[str, float]:
    texts = [found.text for found in run.examples if found.text is not None]
    return corpus_metrics(*zip(*texts, strict=True))[0] if texts else {}


def _compare(
    first: RecordedRun, second: RecordedRun, first_label: str, second_label: str, seed: int
) -> PairResult:
    pairs = common_examples(first, second)
    if not pairs:
        raise ConfigError(
            f"{second.path}: no example has the task and the key of an example in {first.path}; "
            "expected common questions"
        )
    if not set(first.kinds) & set(second.kinds):
        raise ConfigError(
            f"{second.path}: has {joined_kinds(second.kinds)}, {first.path} has {joined_kinds(first.kinds)}; "
            "expected a measure that both have"
        )
    accuracies = _accuracy_differences(pairs, seed)
    loss, retokenized = _loss_difference(pairs, seed)
    metrics = [metric for metric in first.text_metrics if metric in second.text_metrics]
    if not (accuracies or (first.text_metrics and second.text_metrics) or loss or retokenized):
        raise ConfigError(
            f"{second.path}: its texts are evaluated by other measures than those of {first.path}; "
            "expected a measure that both have"
        )
    return PairResult(
        baseline=first_label,
        label=second_label,
        common=len(pairs),
        unpaired=(len(first.examples) - len(pairs), len(second.examples) - len(pairs)),
        different_settings=_different_settings(first, second),
        accuracies=accuracies,
        loss=loss,
        text_metrics=dict(
            zip(metrics, holm([_text_difference(pairs, metric, seed) for metric in metrics]), strict=True)
        ),
        retokenized=retokenized,
    )


def _accuracy_differences(pairs: Pairs, seed: int) -> tuple[AccuracyDifference, ...]:
    """Differences by measure, each task in turn and then the average over tasks; these form a family."""
    by_task = {task: list(of_task) for task, of_task in groupby(pairs, key=lambda pair: pair[0].task)}
    differences = []
    for measure in MEASURES:
        outcomes = {}
        for task, of_task in by_task.items():
            if judged := [(a, b) for a, b in of_task if measure in a.choices and measure in b.choices]:
                outcomes[task] = PairedOutcomes.of(
                    [a.is_correct(measure) for a, _ in judged], [b.is_correct(measure) for _, b in judged]
                )
        rows: list[tuple[str | None, PairedOutcomes | None]] = [*outcomes.items()]
        family = [table.difference for table in outcomes.values()]
        if len(outcomes) > 1:  # the average of one task is that task, and would only add a second p-value
            rows.append((None, None))
            family.append(macro_difference(list(outcomes.values()), np.random.default_rng(seed)))
        differences += [
            AccuracyDifference(measure, task, table, difference)
            for (task, table), difference in zip(rows, holm(family), strict=True)
        ]
    return tuple(differences)


def _loss_difference(pairs: Pairs, seed: int) -> tuple[Difference | None, int]:
    """Difference of the loss per token, None if not comparable; and the number of retokenized answers."""
    if any(found.gold_nll is None for pair in pairs for found in pair):
        return None, 0
    tokens = [(a.gold_tokens, b.gold_tokens) for a, b in pairs]
    retokenized = sum(one != other for one, other in tokens)
    if retokenized or not any(one for one, _ in tokens):
        return None, retokenized
    counts = np.array([one for one, _ in tokens], dtype=np.int64)
    return _pooled_difference(pairs, lambda found: found.gold_nll, counts, seed), 0


def _text_difference(pairs: Pairs, metric: str, seed: int) -> Difference:
    return _pooled_difference(
        pairs, lambda found: found.scores[metric], np.ones(len(pairs), dtype=np.int64), seed
    )


def _pooled_difference(
    pairs: Pairs,
    value: Callable[[RecordedExample], float | None],
    weights: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    seed: int,
) -> Difference:
    first = np.array([value(a) for a, _ in pairs], dtype=np.float64)
    second = np.array([value(b) for _, b in pairs], dtype=np.float64)
    return pooled_difference(first, second, weights, np.random.default_rng(seed))


def _different_settings(first: RecordedRun, second: RecordedRun) -> dict[str, tuple[str, str]] | None:
    if not first.settings or not second.settings:
        return None
    names = sorted({*first.settings, *second.settings})
    both = {name: (first.settings.get(name, "null"), second.settings.get(name, "null")) for name in names}
    if "null" in both.get("backbone", ()):  # a backbone alone has no adapted layers, which are what is hashed
        del both["backbone"]
    return {name: (one, other) for name, (one, other) in both.items() if one != other}
