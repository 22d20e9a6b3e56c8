"""A comparison of runs as Markdown for people and as JSON for programs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gatera_lightning.evaluation.comparison import Comparison, PairResult, RunResult
from gatera_lightning.evaluation.paired_tests import MIN_BOOTSTRAP_ROWS, RESAMPLES, Difference
from gatera_lightning.evaluation.recorded_run import MEASURES
from gatera_lightning.evaluation.text_metrics import CORPUS_METRICS, ROW_METRICS

_CAVEATS = (
    "Brackets are 95 % intervals over the questions. Difference: run minus baseline on their common rows. b / c: questions "
    "that only the baseline / only the run answers right.",
    "p: McNemar's mid-p for one task, interval by Newcombe's method 10; for the average over tasks, the nats and the means of "
    f"metrics of text a paired bootstrap of {RESAMPLES:,} resamples (none below {MIN_BOOTSTRAP_ROWS} rows). The verdict is p's "
    "at the 5 % level.",
    "p-values are not corrected for the number of comparisons: of 20 between equal runs, one is expected below 0.05.",
    "One run per method says nothing about seeds: training again may move a method by more than these intervals, which are "
    "about the questions alone.",
)


def as_markdown(comparison: Comparison) -> str:
    """Accuracies by task and run, differences from the baseline by pair, nats per token, and what the numbers do not say."""
    blocks = [
        f"# {len(comparison.runs)} runs, compared with {_cell(comparison.runs[0].label)}",
        "\n".join(f"- {_cell(run.label)}: {run.rows} rows, `{run.path}`" for run in comparison.runs),
    ]
    if any(run.accuracies for run in comparison.runs):
        blocks += ["## Accuracy", _accuracy_table(comparison)]
    for pair in comparison.pairs:
        blocks += [f"## {_cell(pair.label)} minus {_cell(pair.baseline)}"]
        blocks += [_difference_table(pair)] if pair.accuracies else []
        blocks += [
            f"{pair.common} rows are common; {_cell(pair.baseline)} has {pair.alone[0]} more, "
            f"{_cell(pair.label)} {pair.alone[1]} more.",
            *_evaluated_otherwise(pair),
        ]
    if any(run.loss is not None for run in comparison.runs):
        blocks += ["## Nats per token of the right answers", _loss_table(comparison)]
        blocks += [
            f"{_cell(pair.label)}: {pair.retokenized} of {pair.common} common right answers have another number of tokens than "
            f"in {_cell(pair.baseline)}; nats per token do not compare across tokenizers."
            for pair in comparison.pairs
            if pair.retokenized
        ]
    if any(run.texts for run in comparison.runs):
        blocks += ["## Generated texts against their references", _text_table(comparison)]
    return "\n\n".join([*blocks, "\n".join(f"- {caveat}" for caveat in _CAVEATS)]) + "\n"


def as_json(comparison: Comparison) -> str:
    """All numbers of the Markdown, unrounded, and the counts behind them; null where there is none."""
    runs = [
        {
            "label": run.label,
            "path": run.path,
            "rows": run.rows,
            "accuracy": {
                measure: {
                    "tasks": {
                        task: {**asdict(p), "value": p.value, "interval": p.interval}
                        for task, p in tasks.items()
                    },
                    "average": _average_fields(run, measure, shared) if len(shared) > 1 else None,
                }
                for measure, tasks in run.accuracies.items()
                for shared in [comparison.shared_tasks(measure)]
            },
            "tokens": run.tokens,
            "nats_per_token": run.loss,
            "text": run.texts,
        }
        for run in comparison.runs
    ]
    pairs = [
        {
            "baseline": pair.baseline,
            "label": pair.label,
            "common": pair.common,
            "only_baseline": pair.alone[0],
            "only_run": pair.alone[1],
            "evaluated_otherwise": pair.settings,
            "accuracy": [
                {
                    "measure": row.measure,
                    "task": row.task,
                    "outcomes": row.outcomes and asdict(row.outcomes),
                    **_difference_fields(row.difference, higher_is_better=True),
                }
                for row in pair.accuracies
            ],
            "nats_per_token": pair.loss and _difference_fields(pair.loss, higher_is_better=False),
            "retokenized": pair.retokenized,
            "text": {
                metric: _difference_fields(found, higher_is_better=True)
                for metric, found in pair.texts.items()
            },
        }
        for pair in comparison.pairs
    ]
    return (
        json.dumps(
            {"runs": runs, "pairs": pairs, "notes": _CAVEATS}, indent=2, ensure_ascii=False, allow_nan=False
        )
        + "\n"
    )


def _accuracy_table(comparison: Comparison) -> str:
    rows = []
    for measure in MEASURES:
        having = [run for run in comparison.runs if measure in run.accuracies]
        tasks = sorted({task for run in having for task in run.accuracies[measure]})
        for task in tasks:
            shares = [run.accuracies.get(measure, {}).get(task) for run in comparison.runs]
            ns = [share.n for share in shares if share is not None]
            n = (
                str(ns[0])
                if len(set(ns)) == 1
                else " / ".join("–" if share is None else str(share.n) for share in shares)
            )
            rows.append([measure, task, n, *("–" if share is None else str(share) for share in shares)])
        if len(shared := comparison.shared_tasks(measure)) > 1:
            averages = [
                str(run.average(measure, shared)) if run in having else "–" for run in comparison.runs
            ]
            which = f"the {len(shared)} shared tasks" if len(shared) < len(tasks) else f"{len(shared)} tasks"
            rows.append([measure, f"average of {which}", "", *averages])
    return _table(["measure", "task", "n", *(run.label for run in comparison.runs)], rows)


def _difference_table(pair: PairResult) -> str:
    tasks = len({row.task for row in pair.accuracies} - {None})
    rows = []
    for row in pair.accuracies:
        table = row.outcomes
        task = f"average of {tasks} tasks" if row.task is None else row.task
        counts = f"{table.only_first} / {table.only_second}" if table else ""
        rows.append([row.measure, task, *_difference_cells(row.difference, counts, higher_is_better=True)])
    return _table(["measure", "task", "difference", "b / c", "p", "verdict"], rows)


def _evaluated_otherwise(pair: PairResult) -> list[str]:
    """A paragraph where the two may differ by more than their methods."""
    if pair.settings is None:
        return [
            "How they were evaluated was not compared: evaluation.json is not beside the predictions of both."
        ]
    if not pair.settings:
        return []
    told = [
        f"{name} {_cell(one)[:20]} against {_cell(other)[:20]}"
        for name, (one, other) in pair.settings.items()
    ]
    return [
        f"**Evaluated otherwise**, so that the differences are not the methods' alone: {'; '.join(told)}."
    ]


def _loss_table(comparison: Comparison) -> str:
    rows = []
    for run, pair in zip(comparison.runs, (None, *comparison.pairs), strict=True):
        cells = ["", "", "baseline"] if pair is None else ["–", "–", "not comparable"]
        if pair is not None and pair.loss is not None:
            difference, _, *rest = _difference_cells(pair.loss, "", higher_is_better=False)
            cells = [difference, *rest]
        rows.append(
            [run.label, "–" if run.tokens is None else str(run.tokens), _number(run.loss, "{:.4f}"), *cells]
        )
    return _table(["run", "tokens", "nats per token", "difference on common rows", "p", "verdict"], rows)


def _text_table(comparison: Comparison) -> str:
    rows = []
    for metric, label in (ROW_METRICS | CORPUS_METRICS).items():
        for run, pair in zip(comparison.runs, (None, *comparison.pairs), strict=True):
            if metric in run.texts:
                cells = ["", "", "baseline" if pair is None else "not tested"]
                if pair is not None and metric in pair.texts:
                    difference, _, *rest = _difference_cells(pair.texts[metric], "", higher_is_better=True)
                    cells = [difference, *rest]
                rows.append([label, run.label, f"{run.texts[metric]:.3f}", *cells])
    return _table(["metric", "run", "value", "difference on common rows", "p", "verdict"], rows)


def _difference_cells(difference: Difference, counts: str, *, higher_is_better: bool) -> list[str]:
    digits = 3 if higher_is_better else 4
    low, high = (_number(end, f"{{:+.{digits}f}}") for end in (difference.low, difference.high))
    p = _number(difference.p, "{:.4f}")
    return [
        f"{_number(difference.value, f'{{:+.{digits}f}}')} [{low}, {high}]",
        counts,
        "<0.0001" if p == "0.0000" else p,
        difference.verdict(higher_is_better=higher_is_better),
    ]


def _average_fields(run: RunResult, measure: str, tasks: Sequence[str]) -> dict[str, Any]:
    average = run.average(measure, tasks)
    return {"tasks": list(tasks), "value": average.value, "interval": average.interval}


def _difference_fields(difference: Difference, *, higher_is_better: bool) -> dict[str, Any]:
    numbers = {name: None if math.isnan(value) else value for name, value in asdict(difference).items()}
    return {**numbers, "verdict": difference.verdict(higher_is_better=higher_is_better)}


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else form.format(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(map(_cell, cells)) + " |" for cells in [header, ["---"] * len(header), *rows]
    )


def _cell(text: str) -> str:
    """``text`` where a bar would end the cell and a line break the table."""
    return " ".join(text.split()).replace("|", "\\|")
