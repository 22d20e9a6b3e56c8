"""Checkpoints to resume from, each beside the adapter folder that users keep."""

import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.serialization import save_adapter
from gatera_lightning.checkpointing.checkpoint_io import hold, keep_previous
from gatera_lightning.errors import CheckpointError

TIMED_VALIDATION = (
    "trainer.val_check_interval: a time, which passes at another step on every process, and in a resumed run; accepted: "
    "a number of micro-batches, or a share of an epoch"
)


def better(monitor: str | None) -> Literal["min", "max"]:
    """Which way a logged value gets better: accuracies upwards, losses downwards."""
    return "max" if monitor is not None and "accuracy" in monitor else "min"


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint by ``monitor`` and the last ones; ``NAME.ckpt`` has its adapter in the folder ``NAME/``.

    A checkpoint resumes a run (adapter, optimizer, schedule, data position, random state; never the backbone). An
    adapter folder is what :func:`~gatera_lightning.load_adapter` reads. Both lie in ``<run>/checkpoints``. ``last.ckpt`` is the
    newest, ``last-1.ckpt`` the one before it, for the case that the newest turns out damaged.
    """

    def __init__(
        self,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] | None = None,
        save_top_k: int = 1,
        every_n_steps: int | None = None,
        keep_last: int = 2,
    ) -> None:
        """Keep best and last, written after each validation; last also when training ends.

        Args:
            monitor: Logged value that decides which checkpoint is best; null keeps the last only.
            mode: min or max of the monitored value; null: max for an accuracy, else min.
            save_top_k: How many of the best to keep.
            every_n_steps: Optimizer steps between two more writings of last; null: validations alone. A step that a validation
                follows is left to it.
            keep_last: How many of the last to keep, at least 1.
        """
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name}: {value}; accepted: an integer of at least 1")
        super().__init__(
            monitor=monitor,
            mode=mode or better(monitor),
            save_top_k=save_top_k if monitor else 0,
            save_last=True,
            filename="best-{step}",
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._step_of_last: int | None = None

    @override
    def _should_save_on_train_epoch_end(self, trainer: L.Trainer) -> bool:
        # Lightning takes val_check_interval 1 (every batch) for 1.0 (every epoch), and would save after the epoch's last one.
        if isinstance(trainer.val_check_interval, int) and trainer.enable_validation:
            return False
        return super()._should_save_on_train_epoch_end(trainer)

    def write_last(self, trainer: L.Trainer, *, validated: bool = False) -> Path:
        """Write the last checkpoint now, at the end of an optimizer step; a collective. Raises CheckpointError on all ranks.

        ``validated``: right after a validation, which may have made it the best one as well.
        """
        candidates = self._monitor_candidates(trainer)
        if validated:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
        return Path(self.last_model_path)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due and not trainer.fit_loop._should_accumulate() and not validation_follows(trainer):
            self.write_last(trainer)

    @override
    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        # Lightning moves "last" only where a best one was written too; here it follows every validation.
        self._last_global_step_saved = trainer.global_step

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):  # also when this step is saved already
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        path, failure, held = Path(filepath), None, None
        module: Any = trainer.lightning_module
        try:
            if path.stem == self.CHECKPOINT_NAME_LAST:
                if trainer.is_global_zero and trainer.global_step != self._step_of_last:
                    held = hold(path)
                self._step_of_last = trainer.global_step
        except OSError as error:
            failure = f"cannot keep {path} under another name ({error})"
        super()._save_checkpoint(trainer, filepath)
        failure = getattr(trainer.strategy.checkpoint_io, "failure", None) or failure
        try:
            save_adapter(
                module.model,
                path.with_suffix(""),
                backbone=module.backbone.id,
                revision=module.backbone.revision,
                template=getattr(trainer.datamodule, "template", None),  # type: ignore[attr-defined]
            )
            if held is not None:  # only now: a failed write costs no older checkpoint
                keep_previous(held, path, self.keep_last if failure is None else 1)
        except (OSError, SafetensorError) as error:
            failure = failure or f"cannot write the adapter folder {path.with_suffix('')} ({error})"
        if failure := trainer.strategy.broadcast(failure):  # only rank 0 writes, and all have to know
            raise CheckpointError(failure)

    @override
    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(Path(filepath).with_suffix(""), ignore_errors=True)


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether validation will run before the next training batch: resumed from there, Lightning would leave it out.

    Only the loop itself knows; Lightning has no public way to ask it.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None  # asked in the middle of training
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
