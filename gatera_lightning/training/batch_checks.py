"""Checks of training batches: they come from the schedule that the loss of a step is computed for."""

from typing import Any

import lightning as L
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.compatibility.lightning_internals import given_train_loader
from gatera_lightning.errors import ConfigError
from gatera_lightning.training.setting_checks import check_packing

_ENTRIES = ("input_ids", "attention_mask", "labels", "step_supervised_tokens", "step_tokens")


class BatchChecks:
    """Checks each training batch of one run before its forward pass."""

    def __init__(self) -> None:
        self._accumulate: int | None = None
        self._packing_is_checked = False

    def check(
        self, batch: Any, trainer: L.Trainer | None, model: PreTrainedModel, backbone: BackboneConfig
    ) -> None:
        """Refuse a batch without the totals of its step, a changed step, and packing that is not isolated.

        Raises:
            ConfigError: The batch cannot be trained on.
        """
        if self._accumulate is None:
            _check_entries(batch)
        if trainer is not None:
            self._check_accumulation(trainer)
        if "position_ids" in batch and not self._packing_is_checked:
            check_packing(model, backbone)
            self._packing_is_checked = True

    def _check_accumulation(self, trainer: L.Trainer) -> None:
        found = trainer.accumulate_grad_batches
        if self._accumulate is None:
            schedule = getattr(trainer.train_dataloader, "dataset", None)
            self._accumulate = getattr(schedule, "accumulate", found)
        if found != self._accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches: {found}, changed during the run, but its steps were "
                f"planned with {self._accumulate} micro-batches; accepted: {self._accumulate}"
            )


def check_given_loader(trainer: L.Trainer) -> None:
    """Refuse a user's own loader whose batches lack the totals of their step, before weights are loaded.

    Only a DataLoader over a dataset with indices can be asked without starting it; others are checked with
    their first batch.

    Args:
        trainer: The Trainer, whose ``fit`` was called.

    Raises:
        ConfigError: The batches lack entries.
    """
    loader = given_train_loader(trainer)
    if not isinstance(loader, DataLoader):
        return
    try:
        example = loader.dataset[0]
        batch = example if loader.batch_size is None else loader.collate_fn([example])
    except Exception:  # the user's own code, which the run itself will call and report
        return
    _check_entries(batch)


def _check_entries(batch: Any) -> None:
    missing = [name for name in _ENTRIES if not isinstance(batch, dict) or name not in batch]
    if missing:
        raise ConfigError(
            f"train_dataloaders: its batches lack {', '.join(missing)}: the loss of a step is divided by the "
            "step's totals, which only a batch schedule knows; accepted: a data module of "
            "gatera_lightning.datamodules, or a subclass of TaskDataModule for your own data"
        )
