"""Tables of docs/results, in Markdown, drawn from the ledger alone."""

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence

from benchmarks.quality.families import FAMILIES, MEASURED
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import Selection, chosen_rate, cpu_seconds, forecast, rate_curve, rates_to_try
from benchmarks.quality.results import FamilyResults, Measure, forgotten_at
from benchmarks.quality.statistics import Comparison, detectable_difference

MEASURES: dict[Measure, str] = {
    "heldout": "held-out loss",
    "accuracy": "accuracy",
    "retention": "forgetting",
}


def runs(lines: Sequence[Line]) -> str:
    """Draw how many runs there are by family and stage, their CPU hours, and what is missing."""
    missing = forecast(lines, Selection())
    rows = []
    for family in MEASURED:
        for stage in ("untrained", "rates", "seeds") if family in FAMILIES else ("untrained",):
            done = [line for line in lines if (line["family"], line["stage"]) == (family, stage)]
            open_runs = [run for run in missing if (run.family, run.stage) == (family, stage)]
            hours = sum(line["cost"]["cpu_seconds"] for line in done) / 3600
            expected = sum(cpu_seconds(lines, run) for run in open_runs) / 3600
            rows.append(
                [family, stage, f"{len(done)}", f"{hours:.2f}", f"{len(open_runs)}", f"{expected:.1f}"]
            )
    table = markdown_table(["family", "stage", "runs", "CPU hours", "missing runs", "their CPU hours"], rows)
    machines = sorted({line["environment"]["machine"] for line in lines})
    commits = sorted({line["environment"]["commit"] for line in lines})
    return f"{table}\n\nMachine: {'; '.join(machines) or 'none'}. Commit: {', '.join(commits) or 'none'}."


def families() -> str:
    """Draw which rows of each family a run reads."""
    header = ["family", "from", "rows of a step", "longest row, tokens", "validation rows"]
    header += ["test rows", "of these, for forgetting", "of these, during training"]
    rows = []
    for family in MEASURED.values():
        read = [str(family.batch_size), str(family.max_length), str(family.validation_rows)]
        counts = [str(family.test_rows), str(family.retention_rows), str(family.probe_rows)]
        rows.append(
            [family.name, family.title, *(read if family.is_trained_on else ["", read[1], ""]), *counts]
        )
    return markdown_table(header, rows)


def rates(lines: Sequence[Line], family: str) -> str:
    """Draw the loss on validation rows by method and learning rate; empty without runs."""
    curves = {name: rate_curve(lines, family, name) for name in METHODS if METHODS[name].rates}
    tried = sorted({rate for curve in curves.values() for rate in curve})
    if not tried:
        return ""
    rows = []
    for name, curve in curves.items():
        if not curve:
            continue
        best = chosen_rate(lines, family, METHODS[name])
        cells = [_rate_cell(curve.get(rate), rate == best) for rate in tried]
        left = set(rates_to_try(lines, family, METHODS[name])) - set(curve)
        rows.append([METHODS[name].title, *cells, "not finished" if left else ""])
    return markdown_table(["method", *(f"{rate:g}" for rate in tried), "search"], rows)


def _rate_cell(loss: float | None, is_best: bool) -> str:
    if loss is None:
        return ""
    text = "diverged" if math.isinf(loss) else f"{loss:.3f}"
    return f"**{text}**" if is_best else text


def methods(lines: Sequence[Line], family: str) -> str:
    """Draw what each method reaches, on average over the seeds that all have; empty without runs."""
    results = FamilyResults(family, lines)
    if not results.level_runs and not results.diverged:
        return ""
    accuracy = ["accuracy"] if results.has_accuracy else []
    others = [f"forgetting: {other}" for other in results.others]
    header = ["method", "lr", "seeds", "held-out loss", *accuracy, *others, "CPU s/step"]
    rows = [["untrained", "", "", *untrained_cells(results), *["0"] * len(others), ""]]
    for name in (name for name in METHODS if name in results.level_runs or results.diverged[name]):
        lost = f"{results.diverged[name]} diverged" if results.diverged[name] else ""
        if name not in results.level_runs:
            rows.append([METHODS[name].title, "", lost, *[""] * (len(header) - 3)])
            continue
        found = list(results.level_runs[name].values())
        (heldout,) = results.values(name, "heldout")
        by_seed = heldout.values.sum(1) / heldout.weights.sum()
        cells = [f"{heldout.mean:.3f} ({by_seed.min():.3f}–{by_seed.max():.3f})"]
        if results.has_accuracy:
            cells.append(f"{results.values(name, 'accuracy')[0].mean:.3f}")
        cells += [minus(f"{part.mean:+.3f}") for part in results.values(name, "retention")]
        seconds = sum(line["cost"]["cpu_seconds_per_step"] for line in found) / len(found)
        seeds = ", ".join(filter(None, (f"{len(found)}", lost)))
        rows.append([METHODS[name].title, f"{found[0]['lr']:g}", seeds, *cells, f"{seconds:.2f}"])
    return markdown_table(header, rows)


def untrained_cells(results: FamilyResults) -> list[str]:
    """Return the untrained model's loss, and its accuracy if there is one."""
    test = results.untrained[results.family]["test"]
    cells = [f"{sum(test['sums']) / sum(test['tokens']):.3f}"]
    if results.has_accuracy:
        cells.append(f"{test['correct'].count('1') / len(test['correct']):.3f}")
    return cells


def answers(lines: Sequence[Line], family: str) -> str:
    """Draw the difference that answers each question, and what could have been found; empty without runs."""
    results = FamilyResults(family, lines)
    found = {measure: results.answers(measure) for measure in results.measures}
    rows = []
    for question, first in found["heldout"].items():
        pair = f"{METHODS[question.method].title} − {METHODS[question.reference].title}"
        cells = [
            difference_cell(column[question], higher_is_better=measure == "accuracy")
            for measure, column in found.items()
        ]
        rows.append([question.text, pair, f"{first.seeds}", *cells])
    if not rows:
        return ""
    header = ["question", "difference", "seeds", *(MEASURES[measure] for measure in results.measures)]
    columns = {measure: list(column.values()) for measure, column in found.items()}
    return f"{markdown_table(header, rows)}\n\n{power(columns)}"


def difference_cell(comparison: Comparison, *, higher_is_better: bool, interval: bool = True) -> str:
    """Return a difference with its interval, and in bold whether it is better or worse."""
    found = comparison.difference
    if math.isnan(found.p):
        return minus(f"{found.value:+.3f}, one seed")
    verdict = found.verdict(higher_is_better=higher_is_better)
    shown = "" if verdict == "no difference shown" else f" **{verdict}**"
    between = f" [{found.low:+.3f}, {found.high:+.3f}]" if interval else ""
    return minus(f"{found.value:+.3f}{between}{shown}")


def minus(text: str) -> str:
    """Return the text with minus signs in place of hyphens."""
    return text.replace("-", "−")


def power(columns: Mapping[Measure, Sequence[Comparison]]) -> str:
    """Say what difference this number of seeds and rows could have found, by measure."""
    texts = []
    for measure, column in columns.items():
        tested = [comparison for comparison in column if not math.isnan(comparison.standard_error)]
        found = [detectable_difference(comparison, len(tested)) for comparison in tested]
        if found:
            texts.append(f"{statistics.median(found):.3f} in {MEASURES[measure]}")
    if not texts:
        return "With one seed there is no interval."
    return (
        "A true difference of this size would be found with a probability of 80 %, for the median question: "
        f"{', '.join(texts)}."
    )


def equal_loss(lines: Sequence[Line], family: str) -> str:
    """Draw what each method has forgotten at the held-out loss that all reached; empty without runs."""
    results = FamilyResults(family, lines)
    trajectories = {name: results.trajectory(name) for name in METHODS if name in results.level_runs}
    if not trajectories:
        return ""
    reached = max(min(point.heldout for point in points) for points in trajectories.values())
    rows = []
    for name, points in trajectories.items():
        at_equal = forgotten_at(points, reached)
        rows.append(
            [
                METHODS[name].title,
                f"{len(results.level_runs[name])}",
                "not reached" if at_equal is None else minus(f"{at_equal:+.3f}"),
                f"{points[-1].heldout:.3f}",
                minus(f"{points[-1].forgotten:+.3f}"),
            ]
        )
    header = ["method", "seeds", f"forgetting at {reached:.3f}", "loss at the end", "forgetting at the end"]
    return markdown_table(header, rows)


def gates(lines: Sequence[Line], family: str) -> str:
    """Draw how open the gates are at the end of training; empty without gates."""
    results = FamilyResults(family, lines)
    rows = []
    for name in (name for name in METHODS if name in results.level_runs):
        found = [line["gates"] for line in results.level_runs[name].values() if line["gates"] is not None]
        if found:
            names = ("mean", "closed", "open", "tokens_std", "layers_std")
            means = (sum(gate[key] for gate in found) / len(found) for key in names)
            rows.append([METHODS[name].title, *(f"{value:.3f}" for value in means)])
    header = ["method", "mean", "closed", "open", "deviation over tokens", "deviation over layers"]
    return markdown_table(header, rows) if rows else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


SECTIONS: tuple[tuple[str, Callable[[Sequence[Line], str], str]], ...] = (
    (
        "What the methods reach, on average over the seeds that all of them have; in parentheses the lowest "
        "and the highest seed.",
        methods,
    ),
    (
        "Answers; brackets are 95 % intervals over rows and seeds. Where neither better nor worse stands, no "
        "difference is shown.",
        answers,
    ),
    (
        "Forgetting at equal held-out loss: interpolated where training first reached the loss that every "
        "method reached, on the first test rows, mean over the same seeds. Descriptive: there is no "
        "interval, and the learning rate has decayed further where a method reaches the loss late.",
        equal_loss,
    ),
    (
        "Gates on test rows at the end, same seeds: mean value, shares below 0.1 and above 0.9, standard "
        "deviations.",
        gates,
    ),
    ("Loss on the validation rows by learning rate, seed 0; the chosen rate in bold.", rates),
)
"""A caption, and the table of a family under it."""


def family_section(lines: Sequence[Line], family: str) -> str:
    """Return all tables of a family that have data, each under its caption."""
    drawn = ((caption, draw(lines, family)) for caption, draw in SECTIONS)
    measured = [f"{textwrap.fill(caption, 108)}\n\n{table}" for caption, table in drawn if table]
    return "\n\n".join(measured) or "Not measured yet."
