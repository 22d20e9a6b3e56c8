"""The results of an evaluation as tables for people."""

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gatera_lightning.evaluation.results import LABELS, EvaluationResult
from gatera_lightning.evaluation.text_metrics import CORPUS_METRICS, ROW_METRICS


def print_table(result: EvaluationResult, *, ranking: str = "accuracy") -> None:
    """Accuracies per task and on average, with 95 % intervals; loss; metrics of text."""
    console = Console()
    if not console.is_terminal:  # rich takes 80 columns where there are none, and would break every interval
        console.width = 10_000  # more than any table takes
    if result.measures:
        console.print(_accuracies(result, ranking))
    if result.gold_loss is not None:
        console.print(
            f"right answers: {result.gold_loss:.4f} nats per target token (perplexity {result.perplexity:.2f}), "
            f"{result.counts['likelihood']} rows"
        )
    if text := result.text_metrics():
        names = {name: label for name, label in (ROW_METRICS | CORPUS_METRICS).items() if name in text}
        table = _table(["task", "n", *names.values()], title="generated texts against their references")
        for task in [*result.tasks, None] if len(result.tasks) > 1 else result.tasks:
            found = result.text_metrics(task)
            count = sum("generation" in row for row in result.rows if task in (None, row["task"]))
            table.add_row(
                Text(task or "all"), str(count), *(f"{found[name]:.3f}" if found else "–" for name in names)
            )
        console.print(table)
    for metric, reason in result.skipped.items():
        console.print(Text(f"skipped: {metric}, since {reason}"))
    if "generation" in result.measures:
        console.print(f"generated texts without an answer (counted as wrong): {result.unanswered()}")
    for kind, count in result.counts.items():
        if count < result.expected:
            console.print(
                f"{kind}: only {count} of {result.expected} rows; a limit on the batches left out the others"
            )


def _accuracies(result: EvaluationResult, ranking: str) -> Table:
    table = _table(
        ["task", "n", *(LABELS[measure] for measure in result.measures)], title=f"{ranking} [95 % interval]"
    )
    for task in result.tasks:
        found = [result.accuracy(measure, task) for measure in result.measures]
        counts = list(
            dict.fromkeys(str(share.n) for share in found)
        )  # one, unless a limit cut the ways differently
        table.add_row(Text(task), " / ".join(counts), *(str(share) if share.n else "–" for share in found))
    if len(result.tasks) > 1:
        table.add_section()
        table.add_row(
            "average", str(len(result.rows)), *(str(result.average(measure)) for measure in result.measures)
        )
    return table


def _table(columns: list[str], title: str) -> Table:
    """A table that breaks what a narrow terminal has no room for; rich would leave out the ends of figures."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title)
