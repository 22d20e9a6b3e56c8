"""`demo`: a pretrained model before and after a few minutes of fine-tuning, on test questions."""

from collections.abc import Sequence
from typing import cast

from rich.table import Table

from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.lightning_cli import GateRACLI
from gatera_lightning.evaluation.results import EvaluationResult
from gatera_lightning.terminal.printing import SafeConsole


def demo(argv: Sequence[str]) -> None:
    """Evaluate, fine-tune with `quickstart.yaml`, evaluate again, and print both results.

    Args:
        argv: Any flags of `fit`, which override the config.

    Raises:
        ConfigError: Something in the configuration cannot work.
    """
    run = _DemoCLI(["fit", "--config", "quickstart.yaml", *argv])
    table = Table("test questions", "before", "after", title="GateRA in a few minutes")
    table.add_row(
        "cross-entropy loss (nats per token)", f"{run.before.gold_loss:.3f}", f"{run.after.gold_loss:.3f}"
    )
    for label, score in (
        ("accuracy, per-token likelihood", "per_token"),
        ("accuracy, summed likelihood", "sum"),
    ):
        table.add_row(label, str(run.before.accuracy(score)), str(run.after.accuracy(score)))  # type: ignore[arg-type]
    console = SafeConsole(soft_wrap=True)
    console.print(table)
    console.print(f"adapter:  {run.trainer.checkpoint_callback.best_model_path.removesuffix('.ckpt')}")  # type: ignore[union-attr]
    console.print(f"plots of loss and gates:  tensorboard --logdir {run.trainer.log_dir}")


class _DemoCLI(GateRACLI):
    """`fit` between two evaluations of the same test questions."""

    before: EvaluationResult
    after: EvaluationResult

    def before_fit(self) -> None:
        self.before = self._evaluate(None)

    def after_fit(self) -> None:
        # A run that ends before its first validation has no best checkpoint; its final state is evaluated.
        self.after = self._evaluate(getattr(self.trainer.checkpoint_callback, "best_model_path", "") or None)

    def _evaluate(self, checkpoint: str | None) -> EvaluationResult:
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, verbose=False)
        report = next(c for c in self.trainer.callbacks if isinstance(c, EvaluationReport))  # type: ignore[attr-defined]
        return cast(EvaluationResult, report.result)
