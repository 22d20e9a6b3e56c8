"""``demo``: a pretrained model before and after a few minutes of fine-tuning, on held-out questions."""

from collections.abc import Sequence
from typing import cast

from rich.console import Console
from rich.table import Table

from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.lightning_cli import GateRACLI
from gatera_lightning.evaluation.results import EvaluationResult


class _Demo(GateRACLI):
    """``fit`` between two evaluations of the same held-out questions."""

    before: EvaluationResult
    after: EvaluationResult

    def before_fit(self) -> None:
        self.before = self._evaluate(None)

    def after_fit(self) -> None:
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.after = self._evaluate(
            best or None
        )  # without a validation there is no best: the last state then

    def _evaluate(self, checkpoint: str | None) -> EvaluationResult:
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, verbose=False)
        report = next(c for c in self.trainer.callbacks if isinstance(c, EvaluationReport))  # type: ignore[attr-defined]
        return cast(EvaluationResult, report.result)


def demo(overrides: Sequence[str]) -> None:
    """Evaluate, fine-tune by ``quickstart.yaml`` (and any ``overrides``, as for ``fit``), evaluate again, and compare."""
    run = _Demo(["fit", "--config", "quickstart.yaml", *overrides])
    table = Table("held-out questions", "before", "after", title="GateRA in a few minutes")
    table.add_row("nats per target token", f"{run.before.gold_loss:.3f}", f"{run.after.gold_loss:.3f}")
    for label, score in (
        ("accuracy, per-token likelihood", "per_token"),
        ("accuracy, summed likelihood", "sum"),
    ):
        table.add_row(label, str(run.before.accuracy(score)), str(run.after.accuracy(score)))  # type: ignore[arg-type]
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"adapter:  {run.trainer.checkpoint_callback.best_model_path.removesuffix('.ckpt')}")  # type: ignore[union-attr]
    console.print(f"the gates, in pictures:  tensorboard --logdir {run.trainer.log_dir}")
