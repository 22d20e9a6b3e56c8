"""The progress bar of a run."""

from typing import Any

import datasets
import huggingface_hub.utils
import lightning as L
import transformers
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from gatera_lightning.callbacks.progress_display import ProgressDisplay
from gatera_lightning.callbacks.throughput import Throughput


class StepProgressBar(ProgressBar):
    """Show ``step 40/120  loss 2.310  open 0.52  1,234 tokens/s  ETA 3:20`` over all optimizer steps.

    ``open`` is the mean gate. On a terminal this is a bar at the bottom, whose figures are updated every
    ``trainer.log_every_n_steps`` steps (0: never) and at the last step. Elsewhere it is plain lines, one of
    these updates for each tenth of the run. An evaluation prints a line for each tenth of it; a validation
    during training prints a line with its result. ``trainer.enable_progress_bar: false`` turns everything
    off. Only rank 0 prints.

    Example:
        >>> trainer = Trainer(callbacks=[StepProgressBar()])
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._display: ProgressDisplay | None = (
            None  # shows the training or evaluation, and a validation within it
        )

    @override
    def disable(self) -> None:
        self.is_enabled = False

    @override
    def enable(self) -> None:
        self.is_enabled = True

    # --- training ---

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._display is None:  # not in on_train_start: other callbacks still print there
            self._start("step", trainer.estimated_stepping_batches, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._display is None:
            return
        task = self._display.first_task
        if trainer.global_step == task.completed:
            return  # the optimizer step is not complete yet
        self._display.set_completed(trainer.global_step)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if task.finished or (every and trainer.global_step % every == 0):
            self._display.show(task, _training_figures(trainer))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    # --- evaluation ---

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._start("validate", sum(trainer.num_val_batches))

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start("test", sum(trainer.num_test_batches))

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start("predict", sum(trainer.num_predict_batches))

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._display is None:
            return  # disabled, or a sanity check
        task = self._display.current_task
        self._display.advance()
        if self._display.num_tasks > 1:
            return  # a validation during training
        if task.total and 10 * task.completed // task.total > 10 * (task.completed - 1) // task.total:
            self._display.show(task, [])
        if task.finished:
            self._end()  # before the results are printed

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()
        if self._display is not None:
            figures = [
                f"{name} {float(value):.3f}"
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            ]
            self._display.print_line(self._display.first_task, figures)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    on_predict_end = on_test_end

    # --- every way in which a run ends ---

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _start(self, name: str, total: float, completed: int = 0) -> None:
        if not self.is_enabled:
            return
        if self._display is None:
            self._display = ProgressDisplay()
        self._display.start_task(name, total, completed)

    def _end(self) -> None:
        """End the current task; close the display with the last one."""
        if self._display is not None and self._display.num_tasks > 1:
            self._display.remove_current_task()
        else:
            self._close()

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None


def disable_library_bars() -> None:
    """Turn off the progress bars of Datasets, Transformers and huggingface_hub."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def _training_figures(trainer: L.Trainer) -> list[str]:
    """Loss, mean gate and speed, as far as they are known."""
    metrics = trainer.callback_metrics
    throughput = [c for c in trainer.callbacks if isinstance(c, Throughput)]  # type: ignore[attr-defined]
    rate = throughput[0].tokens_per_second if throughput else None
    return [
        *([f"loss {float(metrics['train/loss']):.3f}"] if "train/loss" in metrics else []),
        *([f"open {float(metrics['train/gate_mean']):.2f}"] if "train/gate_mean" in metrics else []),
        *([f"{rate:,.0f} tokens/s"] if rate is not None else []),
    ]
