"""What holds over all families: a table of the differences, and the few lines that README shows."""

import textwrap
from collections.abc import Sequence

from benchmarks.quality.comparisons import QUESTIONS
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import FamilyResults, Measure, answers_over_families
from benchmarks.quality.tables import (
    MEASURES,
    difference_cell,
    markdown_table,
    minus,
    power,
    untrained_cells,
)

SUMMARIZED = (
    "lora",
    "dora",
    "hira",
    "abba",
    "hira_static",
    "gatera",
    "hard_hira",
    "gated_lora",
    "ts_peft",
)
"""Methods that README shows."""

EVERYWHERE: tuple[Measure, ...] = ("heldout", "retention")
"""What is measured in every family."""


def overview(lines: Sequence[Line]) -> str:
    """Draw the answers in every family, and on average over the families, in one table for each measure."""
    results = [found for found in (FamilyResults(name, lines) for name in FAMILIES) if found.runs]
    if len(results) < 2:
        return "Fewer than two families are measured yet."
    return "\n\n".join(_answers(results, measure) for measure in EVERYWHERE)


def _answers(results: Sequence[FamilyResults], measure: Measure) -> str:
    by_family = [found.answers(measure) for found in results]
    over_families = answers_over_families(results, measure)
    rows = []
    for question in QUESTIONS:
        if question not in over_families:
            continue
        own = [
            difference_cell(answered[question], higher_is_better=False, interval=False)
            for answered in by_family
        ]
        mean = difference_cell(over_families[question], higher_is_better=False)
        pair = f"{METHODS[question.method].title} − {METHODS[question.reference].title}"
        rows.append([pair, *own, mean])
    if not rows:
        return f"No question is answered in all families yet ({MEASURES[measure]})."
    caption = (
        f"Differences in {MEASURES[measure]}, nats per token, and the mean of these families with its 95 % "
        "interval. Better and worse are after Holm's correction over the questions of a column."
    )
    table = markdown_table(["difference", *(found.family for found in results), "mean"], rows)
    detectable = power({measure: list(over_families.values())})
    return f"{textwrap.fill(caption, 108)}\n\n{table}\n\n{detectable}"


def summary(lines: Sequence[Line]) -> str:
    """Draw the methods that README shows: their means over the seeds that all have, in each family."""
    results = [found for found in (FamilyResults(name, lines) for name in FAMILIES) if found.runs]
    header = ["method"]
    for found in results:
        header += [f"{found.family}: loss", *(["accuracy"] if found.has_accuracy else []), "forgetting"]
    rows = [["untrained", *(cell for found in results for cell in [*untrained_cells(found), "0"])]]
    for name in SUMMARIZED:
        cells = [cell for found in results for cell in _summary_cells(found, name)]
        rows.append([METHODS[name].title, *cells])
    return markdown_table(header, rows)


def _summary_cells(results: FamilyResults, method: str) -> list[str]:
    if method not in results.level_runs:
        return [""] * (3 if results.has_accuracy else 2)
    (heldout,) = results.values(method, "heldout")
    accuracies = results.values(method, "accuracy") if results.has_accuracy else []
    forgotten = sum(part.mean for part in results.values(method, "retention")) / len(results.others)
    accuracy = [f"{part.mean:.3f}" for part in accuracies]
    return [f"{heldout.mean:.3f}", *accuracy, minus(f"{forgotten:+.3f}")]
