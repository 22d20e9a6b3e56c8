"""Early stopping that a config can turn off."""

import math
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override

from gatera_lightning.callbacks.adapter_checkpoint import default_mode


class OptionalEarlyStopping(EarlyStopping):
    """End training when validation stops improving; off while ``patience`` is null.

    Example:
        >>> trainer = Trainer(callbacks=[OptionalEarlyStopping(patience=3)])
    """

    def __init__(
        self,
        patience: int | None = None,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] | None = None,
        min_delta: float = 0.0,
    ) -> None:
        """End training when validation stops improving.

        Args:
            patience: Number of validations without improvement after which training ends; null never ends it.
                A small number saves time, but may stop at a temporary plateau.
            monitor: Logged value that should improve: val/loss, or val/accuracy_per_token if
                data.rank_validation is true.
            mode: min or max, the direction in which the monitored value improves; null means max for an
                accuracy and min for everything else.
            min_delta: Smallest change that counts as an improvement.

        Raises:
            ValueError: ``patience`` is less than 1, or ``min_delta`` is negative or not a finite number.
        """
        if patience is not None and patience < 1:
            raise ValueError(
                f"early_stopping.patience: {patience}; accepted: null, or an integer of at least 1"
            )
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"early_stopping.min_delta: {min_delta}; accepted: a number of at least 0")
        self.is_on = patience is not None
        super().__init__(
            monitor=monitor,
            mode=mode or default_mode(monitor),
            patience=patience or 1,
            min_delta=min_delta,
            # Check after each validation. Otherwise Lightning guesses, and confuses val_check_interval 1
            # (every step) with 1.0 (every epoch).
            check_on_train_epoch_end=False,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.is_on else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.is_on and state_dict:  # restore how long the run has waited, but keep this run's patience
            super().load_state_dict(state_dict | {"patience": self.patience})

    @override
    def _should_skip_check(self, trainer: L.Trainer) -> bool:
        return not self.is_on or super()._should_skip_check(trainer)
