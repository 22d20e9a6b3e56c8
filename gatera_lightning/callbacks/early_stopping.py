"""Early stopping that a config can leave off."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override

from gatera_lightning.callbacks.adapter_checkpoint import better


class OptionalEarlyStopping(EarlyStopping):
    """Lightning's EarlyStopping, off while ``patience`` is null."""

    def __init__(
        self,
        patience: int | None = None,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] | None = None,
        min_delta: float = 0.0,
    ) -> None:
        """End training when validation no longer gets better.

        Args:
            patience: Validations without improvement after which training ends; null never ends it.
            monitor: Logged value that should improve: val/loss, or val/accuracy_per_token with data.rank_validation.
            mode: min or max of the monitored value; null: max for an accuracy, else min.
            min_delta: What counts as an improvement.
        """
        if patience is not None and patience < 1:
            raise ValueError(
                f"early_stopping.patience: {patience}; accepted: null, or an integer of at least 1"
            )
        self._on = patience is not None
        # After each validation: Lightning would guess, and take val_check_interval 1 (every step) for 1.0 (every epoch).
        super().__init__(
            monitor=monitor,
            mode=mode or better(monitor),
            patience=patience or 1,
            min_delta=min_delta,
            check_on_train_epoch_end=False,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self._on else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._on and state_dict:  # what was waited for so far; how long to wait is this run's setting
            super().load_state_dict(state_dict | {"patience": self.patience})

    @override
    def _should_skip_check(self, trainer: L.Trainer) -> bool:
        return not self._on or super()._should_skip_check(trainer)
