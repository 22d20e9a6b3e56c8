"""Results of ``test`` and ``predict``: a table to read, JSON to keep."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from gatera_lightning.evaluation.ranking import RankingResult, ranked


class EvaluationReport(L.Callback):
    """After ``test``, a table per task with 95 % intervals and ``test_results.json``; after ``predict``, one JSON line a row.

    Files go to the run's log folder. ``result`` keeps the last ranking for whoever runs the Trainer.
    """

    def __init__(self) -> None:
        self.result: RankingResult | None = None

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        result, folder, names = self._gather(trainer, pl_module)
        if trainer.is_global_zero:
            _print_table(result, names)
            (folder / "test_results.json").write_text(json.dumps(_summary(result, names), indent=2) + "\n")

    @override
    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        result, folder, names = self._gather(trainer, pl_module)
        if trainer.is_global_zero:
            path = folder / "predictions.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for question in result.questions:
                    line = {
                        "example": question.example,
                        "task": names[question.task],
                        "gold": question.gold,
                        "choice_sum": question.choice("sum"),
                        "choice_per_token": question.choice("per_token"),
                        "log_likelihoods": question.log_likelihoods,
                        "tokens": question.tokens,
                    }
                    file.write(json.dumps(line) + "\n")
            print(f"{len(result.questions)} predictions: {path}")

    def _gather(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[RankingResult, Path, list[str]]:
        """The ranking of all processes, the log folder, made, and the tasks' names; collectives, so every rank calls."""
        module: Any = pl_module
        self.result = ranked(*module.ranking.compute())
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return self.result, folder, trainer.datamodule.task_names  # type: ignore[attr-defined]


def _summary(result: RankingResult, names: list[str]) -> dict[str, Any]:
    """What ``test_results.json`` holds: numbers per task, and over all where there are several."""
    present: dict[str, int | None] = {names[task]: task for task in sorted({q.task for q in result.questions})}
    tasks = {}
    for name, task in (present | {"all": None} if len(present) > 1 else present).items():
        by_sum, by_token = result.accuracy("sum", task), result.accuracy("per_token", task)
        tasks[name] = {
            "n": by_sum.n,
            "accuracy_sum": by_sum.value,
            "accuracy_sum_interval": by_sum.interval,
            "accuracy_per_token": by_token.value,
            "accuracy_per_token_interval": by_token.interval,
        }
    return {"nats_per_target_token": result.gold_loss, "tasks": tasks}


def _print_table(result: RankingResult, names: list[str]) -> None:
    table = Table("task", "n", "accuracy, summed likelihood", "accuracy, per token", title="candidate ranking (95 % interval)")
    for name, row in _summary(result, names)["tasks"].items():
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(row[f"accuracy_{score}"], *row[f"accuracy_{score}_interval"])
            for score in ("sum", "per_token")
        ]
        table.add_row(Text(name), str(row["n"]), *cells)
    console = Console()
    console.print(table)
    console.print(f"right answers: {result.gold_loss:.4f} nats per target token")
    if result.incomplete:
        console.print(f"left out: {result.incomplete} questions, of which a limit on the batches cut off candidates")
