"""Print the results of an evaluation as tables."""

from rich.table import Column, Table
from rich.text import Text

from gatera_lightning.evaluation.results import MEASURE_LABELS, EvaluationResult
from gatera_lightning.evaluation.text_metrics import CORPUS_METRICS, EXAMPLE_METRICS
from gatera_lightning.terminal.printing import SafeConsole

_UNLIMITED_WIDTH = 10_000


def print_results(result: EvaluationResult, *, ranking: str = "accuracy") -> None:
    """Print accuracies with 95 % intervals, the loss of the correct answers, and metrics of generated text.

    Args:
        result: What to print.
        ranking: What the share of correctly ranked questions is called, such as ``hits@1``.
    """
    console = SafeConsole()
    if not console.is_terminal:  # rich assumes 80 columns for a file, and would wrap every interval
        console.width = _UNLIMITED_WIDTH
    if result.measures:
        console.print(_accuracy_table(result, ranking))
    if result.gold_loss is not None:
        console.print(
            f"cross-entropy loss of the correct answers: {result.gold_loss:.4f} nats per token "
            f"(perplexity {result.perplexity:.2f}), {result.counts['likelihood']} examples"
        )
    if metrics := result.text_metrics():
        console.print(_text_table(result, metrics))
    for metric, reason in result.skipped.items():
        console.print(Text(f"skipped {metric}: {reason}"))
    if "generation" in result.measures:
        console.print(f"generated texts without an answer (counted as wrong): {result.unanswered()}")
    for kind, count in result.counts.items():
        if count < result.split_size:
            console.print(f"{kind}: only {count} of {result.split_size} examples, because a limit is set")


def _accuracy_table(result: EvaluationResult, ranking: str) -> Table:
    columns = ["task", "n", *(MEASURE_LABELS[measure] for measure in result.measures)]
    table = _table(columns, title=f"{ranking} [95 % interval]")
    for task in result.tasks:
        found = [result.accuracy(measure, task) for measure in result.measures]
        # One count, unless a limit on the batches left another number of examples for each kind.
        counts = list(dict.fromkeys(str(accuracy.n) for accuracy in found))
        cells = (str(accuracy) if accuracy.n else "–" for accuracy in found)
        table.add_row(Text(task), " / ".join(counts), *cells)
    if len(result.tasks) > 1:
        table.add_section()
        averages = (str(result.average(measure)) for measure in result.measures)
        table.add_row("average", str(len(result.examples)), *averages)
    return table


def _text_table(result: EvaluationResult, metrics: dict[str, float]) -> Table:
    labels = {name: label for name, label in (EXAMPLE_METRICS | CORPUS_METRICS).items() if name in metrics}
    table = _table(["task", "n", *labels.values()], title="generated texts compared with their references")
    for task in [*result.tasks, None] if len(result.tasks) > 1 else result.tasks:
        found = result.text_metrics(task)
        count = sum("generation" in example for example in result.examples if task in (None, example["task"]))
        cells = (f"{found[name]:.3f}" if found else "–" for name in labels)
        table.add_row(Text(task or "all"), str(count), *cells)
    return table


def _table(columns: list[str], title: str) -> Table:
    """A table that wraps cells on a narrow terminal; rich would cut figures off by default."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title)
