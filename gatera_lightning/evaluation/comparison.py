"""Recorded runs side by side: each one's accuracies, and the first one against every other on the rows both have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.paired_tests import (
    Difference,
    PairedOutcomes,
    macro_difference,
    pooled_difference,
)
from gatera_lightning.evaluation.recorded_run import MEASURES, RecordedRun, Row, labels, named
from gatera_lightning.evaluation.text_metrics import corpus_metrics

Pairs = Sequence[tuple[Row, Row]]


@dataclass(frozen=True)
class RunResult:
    """One run on all of its own rows; accuracies by measure and task."""

    label: str
    path: str
    rows: int
    accuracies: dict[str, dict[str, Proportion]]
    nats: float | None
    """Of the right answers together; None without likelihoods."""
    tokens: int | None
    texts: dict[str, float]
    """Metrics of the generated texts against their references; empty where texts are judged right or wrong."""

    @property
    def loss(self) -> float | None:
        """Nats per token of the right answers, pooled over all their tokens."""
        return None if self.nats is None or self.tokens is None else self.nats / max(1, self.tokens)

    def average(self, measure: str, tasks: Sequence[str]) -> Average:
        """Mean over ``tasks`` of the measure's accuracies."""
        return Average(tuple(self.accuracies[measure][task] for task in tasks))


@dataclass(frozen=True)
class AccuracyDifference:
    """Of one measure; of one task, or of the average over tasks, which has no ``outcomes`` of its own."""

    measure: str
    task: str | None
    outcomes: PairedOutcomes | None
    difference: Difference


@dataclass(frozen=True)
class PairResult:
    """A run against the baseline on their common rows."""

    baseline: str
    label: str
    common: int
    alone: tuple[int, int]
    """Rows that only the baseline, only the other run has."""
    settings: dict[str, tuple[str, str]] | None
    """What differs in how the two were evaluated, method aside; None where that is not recorded of both."""
    accuracies: tuple[AccuracyDifference, ...]
    loss: Difference | None
    """Of pooled nats per token; None if a run has no likelihoods or ``retokenized`` is not 0."""
    texts: dict[str, Difference]
    """Of the mean of each metric of text that both runs have."""
    retokenized: int
    """Common rows whose right answer is another number of tokens in the other run: nats per token do not compare then."""


@dataclass(frozen=True)
class Comparison:
    """The runs, the first being the baseline, and the pairs."""

    runs: tuple[RunResult, ...]
    pairs: tuple[PairResult, ...]

    def shared_tasks(self, measure: str) -> list[str]:
        """Tasks that all runs with the measure have, over which their averages are comparable."""
        of_runs = [set(run.accuracies[measure]) for run in self.runs if measure in run.accuracies]
        return sorted(set.intersection(*of_runs)) if of_runs else []


def compare_runs(runs: Sequence[RecordedRun], *, seed: int = 0) -> Comparison:
    """Compare the first run with each other one; ``seed`` is the resampling's, afresh for every statistic.

    ConfigError for fewer than two runs, one given twice, no common rows or measures, and golds that differ.
    """
    if len(runs) < 2:
        raise ConfigError(f"compare: got {len(runs)} run; expected a baseline and at least one other")
    paths = [run.path.resolve() for run in runs]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise ConfigError([f"{path}: was given twice; expected different runs" for path in twice])
    names = labels(runs)
    return Comparison(
        tuple(_result(run, name) for run, name in zip(runs, names, strict=True)),
        tuple(
            _pair(runs[0], run, names[0], name, seed) for run, name in zip(runs[1:], names[1:], strict=True)
        ),
    )


def common_rows(first: RecordedRun, second: RecordedRun) -> Pairs:
    """Rows of the same question: equal task, key, and occurrence of the key in its task.

    ConfigError if their golds or references differ.
    """
    pairs = [(row, second.by_question[q]) for q, row in first.by_question.items() if q in second.by_question]
    for a, b in pairs:
        if a.gold != b.gold:
            raise ConfigError(
                f"{second.path}, line {b.line}: gold is {b.gold}; expected {a.gold} as for the same question in "
                f"{first.path}, line {a.line} (task {a.task!r}, key {a.key!r})"
            )
        if a.text and b.text and a.text[1] != b.text[1]:
            raise ConfigError(
                f"{second.path}, line {b.line}: its reference is {b.text[1]!r:.60}; expected {a.text[1]!r:.60} as for the same "
                f"question in {first.path}, line {a.line} (task {a.task!r}, key {a.key!r})"
            )
    return pairs


def _result(run: RecordedRun, label: str) -> RunResult:
    accuracies: dict[str, dict[str, Proportion]] = {measure: {} for measure in run.measures}
    for task, of_task in groupby(run.rows, key=lambda row: row.task):  # rows are sorted by task
        rows = list(of_task)
        for measure in run.measures:
            if judged := [row.right(measure) for row in rows if measure in row.choices]:
                accuracies[measure][task] = Proportion(sum(judged), len(judged))
    scored = [(row.nats, row.tokens) for row in run.rows if row.nats is not None and row.tokens is not None]
    return RunResult(
        label,
        str(run.path),
        len(run.rows),
        accuracies,
        math.fsum(nats for nats, _ in scored) if scored else None,
        sum(tokens for _, tokens in scored) if scored else None,
        {metric: math.fsum(row.scores[metric] for row in run.rows) / len(run.rows) for metric in run.metrics}
        | _corpus(run),
    )


def _corpus(run: RecordedRun) -> dict[str, float]:
    texts = [row.text for row in run.rows if row.text is not None]
    return corpus_metrics(*zip(*texts, strict=True))[0] if texts else {}


def _pair(
    first: RecordedRun, second: RecordedRun, first_label: str, second_label: str, seed: int
) -> PairResult:
    pairs = common_rows(first, second)
    if not pairs:
        raise ConfigError(
            f"{second.path}: no row has task and key of a row in {first.path}; expected common questions"
        )
    if not set(first.kinds) & set(second.kinds):
        raise ConfigError(
            f"{second.path}: has {named(second.kinds)}, {first.path} has {named(first.kinds)}; "
            "expected a measure that both have"
        )
    by_task = {task: list(rows) for task, rows in groupby(pairs, key=lambda pair: pair[0].task)}
    accuracies = []
    for measure in MEASURES:
        outcomes = {}
        for task, rows in by_task.items():
            if judged := [(a, b) for a, b in rows if measure in a.choices and measure in b.choices]:
                outcomes[task] = PairedOutcomes.of(
                    [a.right(measure) for a, _ in judged], [b.right(measure) for _, b in judged]
                )
        accuracies += [
            AccuracyDifference(measure, task, table, table.difference) for task, table in outcomes.items()
        ]
        if len(outcomes) > 1:  # the average of one task is that task: a second p for it would only confuse
            macro = macro_difference(list(outcomes.values()), np.random.default_rng(seed))
            accuracies.append(AccuracyDifference(measure, None, None, macro))
    loss, retokenized = _loss(pairs, seed)
    common = (accuracies, first.metrics and second.metrics, loss, retokenized)
    if not any(common):
        raise ConfigError(
            f"{second.path}: its texts are judged otherwise than those of {first.path}; expected a measure that both have"
        )
    texts = {metric: _text(pairs, metric, seed) for metric in first.metrics if metric in second.metrics}
    alone = (len(first.rows) - len(pairs), len(second.rows) - len(pairs))
    settings = _settings_that_differ(first, second)
    return PairResult(
        first_label, second_label, len(pairs), alone, settings, tuple(accuracies), loss, texts, retokenized
    )


def _settings_that_differ(first: RecordedRun, second: RecordedRun) -> dict[str, tuple[str, str]] | None:
    if not first.settings or not second.settings:
        return None
    names = sorted({*first.settings, *second.settings})
    both = {name: (first.settings.get(name, "null"), second.settings.get(name, "null")) for name in names}
    return {name: (one, other) for name, (one, other) in both.items() if one != other}


def _loss(pairs: Pairs, seed: int) -> tuple[Difference | None, int]:
    if any(row.nats is None for pair in pairs for row in pair):
        return None, 0
    tokens = [(a.tokens, b.tokens) for a, b in pairs]
    retokenized = sum(one != other for one, other in tokens)
    if retokenized or not any(one for one, _ in tokens):
        return None, retokenized
    first, second = (np.array([pair[i].nats for pair in pairs], dtype=np.float64) for i in (0, 1))
    counts = np.array([one for one, _ in tokens], dtype=np.int64)
    return pooled_difference(first, second, counts, np.random.default_rng(seed)), 0


def _text(pairs: Pairs, metric: str, seed: int) -> Difference:
    first, second = (np.array([pair[i].scores[metric] for pair in pairs], dtype=np.float64) for i in (0, 1))
    return pooled_difference(first, second, np.ones(len(pairs), dtype=np.int64), np.random.default_rng(seed))
