"""Checkpoints that resume a run, and the adapter folder beside each of them."""

import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.serialization import save_adapter
from gatera_lightning.callbacks.card_details import run_details
from gatera_lightning.callbacks.checkpoint_paths import own_paths_only, owns
from gatera_lightning.checkpointing.integrity import CHECKPOINT_FOLDER
from gatera_lightning.checkpointing.output_check import folder_problem
from gatera_lightning.checkpointing.rotation import hold_current, rotate
from gatera_lightning.checkpointing.run_lock import claim, release
from gatera_lightning.compatibility.lightning_internals import is_accumulating, validation_follows
from gatera_lightning.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


def default_mode(monitor: str | None) -> Literal["min", "max"]:
    """Return in which direction a monitored value improves: ``min``, except for what should be large."""
    large = ("accuracy", "acceptance", "tokens_per_cycle")
    return "max" if monitor is not None and any(name in monitor for name in large) else "min"


class AdapterCheckpoint(ModelCheckpoint):
    """Keep the best checkpoints by a monitored value, and the last ones, in ``<run>/checkpoints``.

    A checkpoint ``NAME.ckpt`` resumes the run: it holds the adapter, the optimizer, the learning rate
    schedule, the position in the data and the random states, but not the backbone. The folder ``NAME/``
    beside it holds the adapter alone, as :func:`~gatera_lightning.load_adapter` reads it. ``last.ckpt`` is
    the newest checkpoint and ``last-1.ckpt`` the one before, in case the newest is corrupt.

    Example:
        >>> trainer = Trainer(callbacks=[AdapterCheckpoint(monitor="val/accuracy_per_token")])
    """

    def __init__(
        self,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] | None = None,
        save_top_k: int = 1,
        every_n_steps: int | None = None,
        keep_last: int = 2,
    ) -> None:
        """Save the best and the last checkpoints after each validation, and the last one when training ends.

        Args:
            monitor: Logged value that decides which checkpoint is best; null saves only the last ones.
            mode: min or max, the direction in which the monitored value improves; null means max for an
                accuracy, acceptance and tokens_per_cycle, and min for everything else.
            save_top_k: How many of the best checkpoints to keep. More of them use more disk space.
            every_n_steps: Also save the last checkpoint every this many optimizer steps; null saves it only
                after validations. A small number loses less work when a run is killed, but each save pauses
                training. A step that is followed by a validation is saved after that validation.
            keep_last: How many of the last checkpoints to keep, at least 1. With 1 there is nothing to return
                to if the newest is corrupt.

        Raises:
            ValueError: ``every_n_steps`` or ``keep_last`` is less than 1, or ``save_top_k`` less than -1.
        """
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name}: {value}; accepted: an integer of at least 1")
        if save_top_k < -1:
            raise ValueError(f"checkpoint.save_top_k: {save_top_k}; accepted: at least 0, or -1 for all")
        super().__init__(
            monitor=monitor,
            mode=mode or default_mode(monitor),
            save_top_k=save_top_k if monitor else 0,
            save_last=True,
            filename="best-{step}",
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._step_of_last: int | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder of the checkpoints, and claim the run folder above it for training; a collective.

        Raises:
            ConfigError: On every rank, if another run holds the run folder, or the checkpoints cannot be
                written.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        problem = None
        if trainer.is_global_zero:
            problem = claim(self._run_folder)
            if problem is None and (unusable := folder_problem(Path(str(self.dirpath)))):
                problem = f"the checkpoints cannot be written ({unusable}); accepted: another run folder"
        if problem := trainer.strategy.broadcast(problem):
            raise ConfigError(problem, on_every_rank=True)

    def keep_in(self, run_folder: Path) -> None:
        """Keep the checkpoints in ``<run_folder>/checkpoints``, if no folder is set yet.

        Without it, Lightning decides: ``<save_dir>/<name>/<version>`` of the first logger.
        """
        if self.dirpath is None:
            self.dirpath = str(run_folder / CHECKPOINT_FOLDER)

    @property
    def _run_folder(self) -> Path:
        return Path(str(self.dirpath)).parent

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self.dirpath is not None:
            release(self._run_folder)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self.dirpath is not None:
            release(self._run_folder)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore which checkpoints are best and last, as far as they are in this run's own folder.

        They will be removed when better ones replace them, so a checkpoint must not name other files.
        """
        super().load_state_dict(own_paths_only(self, state_dict))

    @override
    def _should_save_on_train_epoch_end(self, trainer: L.Trainer) -> bool:
        # Lightning confuses val_check_interval 1 (every batch) with 1.0 (every epoch) here, and would save
        # after the last step of the epoch as well.
        if isinstance(trainer.val_check_interval, int) and trainer.enable_validation:
            return False
        return super()._should_save_on_train_epoch_end(trainer)

    def write_last(self, trainer: L.Trainer, *, validated: bool = False) -> Path:
        """Write the last checkpoint now, at the end of an optimizer step; a collective.

        Args:
            trainer: The trainer of the run.
            validated: Whether a validation just ended, so that this may also be the best checkpoint.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: The checkpoint or its adapter folder cannot be written; raised on all ranks.
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
        if due and not is_accumulating(trainer) and not validation_follows(trainer):
            self.write_last(trainer)

    @override
    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        # Lightning updates "last" only if it also wrote a best checkpoint; here every validation updates it.
        self._last_global_step_saved = trainer.global_step

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(
            trainer
        ):  # write "last" even if this step is already saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        path, failure, held = Path(filepath), None, None
        module: Any = trainer.lightning_module
        try:
            if path.stem == self.CHECKPOINT_NAME_LAST:
                if trainer.is_global_zero and trainer.global_step != self._step_of_last:
                    held = hold_current(path)
                self._step_of_last = trainer.global_step
        except OSError as error:
            failure = f"cannot rename the previous {path} ({error})"
        super()._save_checkpoint(trainer, filepath)
        failure = getattr(trainer.strategy.checkpoint_io, "failure", None) or failure
        try:
            save_adapter(
                module.model,
                path.with_suffix(""),
                backbone=module.backbone.id,
                revision=module.backbone.revision,
                template=getattr(trainer.datamodule, "template", None),  # type: ignore[attr-defined]
                details=run_details(trainer),
            )
            if held is not None:  # remove older checkpoints only after the new one is written
                rotate(held, path, self.keep_last if failure is None else 1)
        except (OSError, SafetensorError) as error:
            failure = failure or f"cannot write the adapter folder {path.with_suffix('')} ({error})"
        if failure := trainer.strategy.broadcast(failure):  # only rank 0 writes, but all ranks have to raise
            raise CheckpointError(failure)

    @override
    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not owns(self, filepath):
            log.warning("%s is not a checkpoint in %s: it is not removed", filepath, self.dirpath)
            return
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(Path(filepath).with_suffix(""), ignore_errors=True)
