"""Reports of a comparison: Markdown for people and JSON for programs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gatera_lightning.errors import checks_arguments, printable
from gatera_lightning.evaluation.comparison import Comparison, PairResult, RunResult
from gatera_lightning.evaluation.paired_tests import MIN_BOOTSTRAP_EXAMPLES, RESAMPLES, Difference
from gatera_lightning.evaluation.recorded_example import MEASURES
from gatera_lightning.evaluation.text_metrics import CORPUS_METRICS, EXAMPLE_METRICS

_NOTES = (
    "Brackets are 95 % intervals over the questions. Differences are run minus baseline on the examples that "
    "both have. b / c: questions that only the baseline / only the run answers correctly.",
    "p-values: the mid-p form of McNemar's test for one task, with an interval by Newcombe's method 10; for "
    "the average over tasks, the loss and the means of text metrics, a paired bootstrap of "
    f"{RESAMPLES:,} resamples (none with fewer than {MIN_BOOTSTRAP_EXAMPLES} examples).",
    "p (Holm) is p adjusted by Holm's method for the number of tests: over the tasks and their average for "
    "each measure, and over the text metrics. Verdicts use it at the 5 % level, so at most 5 % of "
    "comparisons of equal runs name any task better or worse. It is not adjusted for the number of measures "
    "or of runs.",
    "One run per method says nothing about seeds: another seed may change a method by more than these "
    "intervals, which cover the choice of questions alone.",
)


@checks_arguments
def as_markdown(comparison: Comparison) -> str:
    """Format a comparison as Markdown: accuracies, differences, losses, text metrics, and notes on them."""
    baseline = comparison.runs[0]
    blocks = [
        f"# Comparison of {len(comparison.runs)} runs with the baseline {_cell(baseline.label)}",
        "\n".join(
            f"- {_cell(run.label)}: {run.examples} examples, `{_cell(run.path)}`" for run in comparison.runs
        ),
    ]
    if any(run.accuracies for run in comparison.runs):
        blocks += ["## Accuracy", _accuracy_table(comparison)]
    for pair in comparison.pairs:
        blocks.append(f"## {_cell(pair.label)} minus {_cell(pair.baseline)}")
        if pair.accuracies:
            blocks.append(_difference_table(pair))
        blocks.append(
            f"{pair.common} examples in common; {pair.unpaired[0]} more only in {_cell(pair.baseline)}, "
            f"{pair.unpaired[1]} more only in {_cell(pair.label)}."
        )
        blocks += _settings_paragraphs(pair)
    if any(run.loss is not None for run in comparison.runs):
        blocks += ["## Cross-entropy loss of the correct answers (nats per token)", _loss_table(comparison)]
        blocks += [
            f"{_cell(pair.label)}: {pair.retokenized} of {pair.common} common correct answers have another "
            f"number of tokens than in {_cell(pair.baseline)}; losses per token cannot be compared between "
            "tokenizers."
            for pair in comparison.pairs
            if pair.retokenized
        ]
    if any(run.text_metrics for run in comparison.runs):
        blocks += ["## Generated texts compared with their references", _text_table(comparison)]
    return printable("\n\n".join([*blocks, "\n".join(f"- {note}" for note in _NOTES)]) + "\n")


@checks_arguments
def as_json(comparison: Comparison) -> str:
    """Format a comparison as JSON: unrounded figures and the counts behind them; null where there is none."""
    content = {
        "runs": [_run_fields(comparison, run) for run in comparison.runs],
        "pairs": [_pair_fields(pair) for pair in comparison.pairs],
        "notes": _NOTES,
    }
    return printable(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _run_fields(comparison: Comparison, run: RunResult) -> dict[str, Any]:
    accuracies = {}
    for measure, tasks in run.accuracies.items():
        shared = comparison.shared_tasks(measure)
        accuracies[measure] = {
            "tasks": {
                task: {**asdict(found), "value": found.value, "interval": found.interval}
                for task, found in tasks.items()
            },
            "average": _average_fields(run, measure, shared) if len(shared) > 1 else None,
        }
    return {
        "label": run.label,
        "path": run.path,
        "rows": run.examples,
        "accuracy": accuracies,
        "tokens": run.gold_tokens,
        "nats_per_token": run.loss,
        "text": run.text_metrics,
    }


def _pair_fields(pair: PairResult) -> dict[str, Any]:
    return {
        "baseline": pair.baseline,
        "label": pair.label,
        "common": pair.common,
        "only_baseline": pair.unpaired[0],
        "only_run": pair.unpaired[1],
        "evaluated_otherwise": pair.different_settings,
        "accuracy": [
            {
                "measure": found.measure,
                "task": found.task,
                "outcomes": found.outcomes and asdict(found.outcomes),
                **_difference_fields(found.difference, higher_is_better=True),
            }
            for found in pair.accuracies
        ],
        "nats_per_token": pair.loss and _difference_fields(pair.loss, higher_is_better=False),
        "retokenized": pair.retokenized,
        "text": {
            metric: _difference_fields(found, higher_is_better=True)
            for metric, found in pair.text_metrics.items()
        },
    }


def _average_fields(run: RunResult, measure: str, tasks: Sequence[str]) -> dict[str, Any]:
    average = run.average(measure, tasks)
    return {"tasks": list(tasks), "value": average.value, "interval": average.interval}


def _difference_fields(difference: Difference, *, higher_is_better: bool) -> dict[str, Any]:
    numbers = {
        name: None if value is None or math.isnan(value) else value
        for name, value in asdict(difference).items()
    }
    if difference.adjusted_p is None:  # a test that stands alone
        numbers["adjusted_p"] = numbers["p"]
    return {**numbers, "verdict": difference.verdict(higher_is_better=higher_is_better)}


def _accuracy_table(comparison: Comparison) -> str:
    rows = []
    for measure in MEASURES:
        having = [run for run in comparison.runs if measure in run.accuracies]
        tasks = sorted({task for run in having for task in run.accuracies[measure]})
        for task in tasks:
            found = [run.accuracies.get(measure, {}).get(task) for run in comparison.runs]
            counts = ["–" if accuracy is None else str(accuracy.n) for accuracy in found]
            present = [count for count in counts if count != "–"]
            n = present[0] if len(set(present)) == 1 else " / ".join(counts)
            rows.append(
                [measure, task, n, *("–" if accuracy is None else str(accuracy) for accuracy in found)]
            )
        if len(shared := comparison.shared_tasks(measure)) > 1:
            averages = [
                str(run.average(measure, shared)) if run in having else "–" for run in comparison.runs
            ]
            which = f"the {len(shared)} shared tasks" if len(shared) < len(tasks) else f"{len(shared)} tasks"
            rows.append([measure, f"average of {which}", "", *averages])
    return _table(["measure", "task", "n", *(run.label for run in comparison.runs)], rows)


def _difference_table(pair: PairResult) -> str:
    tasks = len({found.task for found in pair.accuracies} - {None})
    rows = []
    for found in pair.accuracies:
        outcomes = found.outcomes
        task = f"average of {tasks} tasks" if found.task is None else found.task
        counts = f"{outcomes.only_first} / {outcomes.only_second}" if outcomes else ""
        value, *tested = _difference_cells(found.difference, higher_is_better=True)
        rows.append([found.measure, task, value, counts, *tested])
    return _table(["measure", "task", "difference", "b / c", "p", "p (Holm)", "verdict"], rows)


def _settings_paragraphs(pair: PairResult) -> list[str]:
    """A paragraph where the two runs may differ by more than their methods."""
    if pair.different_settings is None:
        return [
            "Evaluation settings were not compared, because evaluation.json is not beside the predictions of "
            "both runs."
        ]
    if not pair.different_settings:
        return []
    settings = (
        f"{name} {_cell(one)[:20]} against {_cell(other)[:20]}"
        for name, (one, other) in pair.different_settings.items()
    )
    return [
        "**Different evaluation settings**, so the differences are not due to the methods alone: "
        f"{'; '.join(settings)}."
    ]


def _loss_table(comparison: Comparison) -> str:
    rows = []
    for run, pair in zip(comparison.runs, (None, *comparison.pairs), strict=True):
        if pair is None:
            cells = ["", "", "baseline"]
        elif pair.loss is None:
            cells = ["–", "–", "not comparable"]
        else:
            difference, p, _, verdict = _difference_cells(pair.loss, higher_is_better=False)
            cells = [difference, p, verdict]
        tokens = "–" if run.gold_tokens is None else str(run.gold_tokens)
        rows.append([run.label, tokens, _number(run.loss, "{:.4f}"), *cells])
    return _table(["run", "tokens", "loss", "difference on common examples", "p", "verdict"], rows)


def _text_table(comparison: Comparison) -> str:
    rows = []
    for metric, label in (EXAMPLE_METRICS | CORPUS_METRICS).items():
        for run, pair in zip(comparison.runs, (None, *comparison.pairs), strict=True):
            if metric not in run.text_metrics:
                continue
            if pair is None:
                cells = ["", "", "", "baseline"]
            elif metric not in pair.text_metrics:
                cells = ["", "", "", "not tested"]
            else:
                cells = _difference_cells(pair.text_metrics[metric], higher_is_better=True)
            rows.append([label, run.label, f"{run.text_metrics[metric]:.3f}", *cells])
    header = ["metric", "run", "value", "difference on common examples", "p", "p (Holm)", "verdict"]
    return _table(header, rows)


def _difference_cells(difference: Difference, *, higher_is_better: bool) -> list[str]:
    """Cells for the difference with its interval, for p and adjusted p, and for the verdict."""
    digits = 3 if higher_is_better else 4
    signed = f"{{:+.{digits}f}}"
    value, low, high = (_number(end, signed) for end in (difference.value, difference.low, difference.high))
    ps = (_number(p, "{:.4f}") for p in (difference.p, difference.adjusted_p))
    return [
        f"{value} [{low}, {high}]",
        *("<0.0001" if p == "0.0000" else p for p in ps),
        difference.verdict(higher_is_better=higher_is_better),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else form.format(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, cells)) + " |" for cells in lines)


def _cell(text: str) -> str:
    """Escape what would end a table cell: bars and line breaks."""
    return " ".join(text.split()).replace("|", "\\|")
