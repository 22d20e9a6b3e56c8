"""How far a run is and what matters of it: a bar on a terminal, plain lines in a file."""

import math
import sys
from typing import Any

import datasets
import huggingface_hub.utils
import lightning as L
import transformers
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
from typing_extensions import override

from gatera_lightning.callbacks.throughput import Throughput


class StepProgressBar(ProgressBar):
    """``step 40/120  loss 2.310  open 0.52  1,234 tokens/s  ETA 3:20``, over the optimizer steps of the whole run.

    ``open`` is the mean gate. On a terminal this is one bar, at the bottom; elsewhere it is lines without control characters.
    Figures are renewed, and lines written, every ``trainer.log_every_n_steps`` steps (0: never) and at the last one; an
    evaluation writes a line for each tenth of it. A validation within training leaves a line with its result in either case.
    ``trainer.enable_progress_bar: false`` turns all of it off. Only the first process says anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._live = False
        self._progress: Progress | None = (
            None  # its tasks are what runs and, below it, a validation within training
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
        if self._progress is None:  # the first one: what others print when training starts stands above
            self._begin("step", trainer.estimated_stepping_batches, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:
            return
        task = self._progress.tasks[0]
        if trainer.global_step == task.completed:
            return  # in the middle of an accumulated step
        self._progress.update(task.id, completed=trainer.global_step)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if task.finished or (every and trainer.global_step % every == 0):
            self._show(task, *_figures(trainer))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    # --- evaluation ---

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin("validate", sum(trainer.num_val_batches))

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("test", sum(trainer.num_test_batches))

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("predict", sum(trainer.num_predict_batches))

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._progress is None:
            return  # not enabled, or a sanity check
        task = self._progress.tasks[-1]
        self._progress.advance(task.id)
        alone = len(self._progress.tasks) == 1
        if (
            alone
            and task.total
            and 10 * task.completed // task.total > 10 * (task.completed - 1) // task.total
        ):
            self._show(task)
        if alone and task.finished:
            self._end()  # before the results are printed

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()
        if self._progress is not None:
            scores = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            found = [f"{name} {value:.3f}" for name, value in scores.items()]
            # A line that stays: where a bar is, it has taken the place of stdout. At once, for a file may be watched.
            print("  ".join([_position(self._progress.tasks[0]), *found]), flush=True)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    on_predict_end = on_test_end

    # --- however it ends ---

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    # --- what is seen ---

    def _begin(self, name: str, total: float, completed: int = 0) -> None:
        if not self.is_enabled:
            return
        if self._progress is None:
            console = Console(highlight=False)
            self._live = (
                sys.stdout.isatty() and console.is_interactive
            )  # by FORCE_COLOR, a file is interactive too
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # what the figures leave of the line
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
                expand=True,
                refresh_per_second=4,
                speed_estimate_period=math.inf,  # a step may take an hour; rich looks at the last 1,000 of them
                redirect_stderr=sys.stderr.isatty(),
                disable=not self._live,
            )
            self._progress.start()
        self._progress.add_task(
            name, total=total if math.isfinite(total) else None, completed=completed, figures=""
        )

    def _show(self, task: Task, *figures: str) -> None:
        """Renew a task's figures."""
        assert self._progress is not None
        if not task.finished and task.time_remaining is not None:
            figures = (*figures, f"ETA {_clock(int(task.time_remaining))}")
        self._progress.update(task.id, figures="  ".join(figures))
        if not self._live:
            print("  ".join([_position(task), *figures]), flush=True)

    def _end(self) -> None:
        if self._progress is not None and len(self._progress.tasks) > 1:
            self._progress.remove_task(self._progress.tasks[-1].id)
        else:
            self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def disable_library_bars() -> None:
    """Let Datasets, Transformers and the hub load, convert and download in silence."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def _figures(trainer: L.Trainer) -> list[str]:
    """What matters of a step; nothing that is not known."""
    metrics = trainer.callback_metrics
    measured = [c for c in trainer.callbacks if isinstance(c, Throughput)]  # type: ignore[attr-defined]
    rate = measured[0].tokens_per_second if measured else None
    return [
        *([f"loss {float(metrics['train/loss']):.3f}"] if "train/loss" in metrics else []),
        *([f"open {float(metrics['train/gate_mean']):.2f}"] if "train/gate_mean" in metrics else []),
        *([f"{rate:,.0f} tokens/s"] if rate is not None else []),
    ]


def _position(task: Task) -> str:
    total = "" if task.total is None else f"/{int(task.total)}"
    return f"{task.description} {int(task.completed)}{total}"


def _clock(seconds: int) -> str:
    """As 3:20 or 2:03:20."""
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
