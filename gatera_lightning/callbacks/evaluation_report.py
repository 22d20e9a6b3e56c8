"""Results of ``test`` and ``predict``: a table to read, JSON to keep."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
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
        module: Any = pl_module
        self.result = ranked(*module.ranking.compute())
        folder = _run_folder(trainer)
        if not trainer.is_global_zero:
            return
        names = trainer.datamodule.task_names  # type: ignore[attr-defined]
        rows: list[tuple[str, int | None]] = [(names[task], task) for task in sorted({q.task for q in self.result.questions})]
        if len(rows) > 1:
            rows.append(("all", None))
        table = Table(
            "task", "n", "accuracy, summed likelihood", "accuracy, per token", title="candidate ranking (95 % interval)"
        )
        tasks = {}
        for name, task in rows:
            by_sum, by_token = self.result.accuracy("sum", task), self.result.accuracy("per_token", task)
            table.add_row(name, str(by_sum.n), str(by_sum), str(by_token))
            tasks[name] = {
                "n": by_sum.n,
                "accuracy_sum": by_sum.value,
                "accuracy_sum_interval": by_sum.interval,
                "accuracy_per_token": by_token.value,
                "accuracy_per_token_interval": by_token.interval,
            }
        console = Console()
        console.print(table)
        console.print(f"right answers: {self.result.gold_loss:.4f} nats per target token")
        if self.result.incomplete:
            console.print(f"left out: {self.result.incomplete} questions, of which a limit on the batches cut off candidates")
        report = {"nats_per_target_token": self.result.gold_loss, "tasks": tasks}
        (folder / "test_results.json").write_text(json.dumps(report, indent=2) + "\n")

    @override
    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        self.result = ranked(*module.ranking.compute())
        folder = _run_folder(trainer)
        if not trainer.is_global_zero:
            return
        names = trainer.datamodule.task_names  # type: ignore[attr-defined]
        path = folder / "predictions.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for q in self.result.questions:
                line = {
                    "example": q.example,
                    "task": names[q.task],
                    "gold": q.gold,
                    "choice_sum": q.choice("sum"),
                    "choice_per_token": q.choice("per_token"),
                    "log_likelihoods": q.log_likelihoods,
                    "tokens": q.tokens,
                }
                file.write(json.dumps(line) + "\n")
        print(f"{len(self.result.questions)} predictions: {path}")


def _run_folder(trainer: L.Trainer) -> Path:
    """The log folder, made; every rank must ask, because Lightning broadcasts it."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
