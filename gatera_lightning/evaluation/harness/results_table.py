"""Print the results of lm-eval as a table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from gatera_lightning.terminal.printing import SafeConsole

_UNLIMITED_WIDTH = 10_000


def print_harness_results(found: Mapping[str, Any]) -> None:
    """Print each metric of each task and group with its standard error.

    Args:
        found: What ``lm_eval.evaluate`` returned.
    """
    console = SafeConsole()
    if not console.is_terminal:  # rich assumes 80 columns for a file
        console.width = _UNLIMITED_WIDTH
    names = ["task", "version", "n", "shots", "filter", "metric", "value", "± standard error"]
    table = Table(*(Column(name, overflow="fold") for name in names), title="lm-eval")
    for task, results in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective", results.get("sample_len", "–"))
        place = [found["versions"].get(task, "–"), n, found["n-shot"].get(task, "–")]
        for key, value in results.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{filter_name}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else "–"
            table.add_row(
                *(Text(str(cell)) for cell in (task, *place, filter_name, metric, f"{value:.4f}", shown))
            )
    console.print(table)
