"""Random states in checkpoints: a resumed run draws the same dropout masks as an uninterrupted one."""

import logging
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from typing_extensions import override

from gatera_lightning.checkpointing.callback_states import random_state_problems
from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.errors import CheckpointError

log = logging.getLogger(__name__)

_SEED_STEP = 1_000_003
"""Between the seeds of two ranks; a prime, so that ranks of runs with neighboring seeds differ too."""


class RNGState(L.Callback):
    """Save the random states of torch, numpy and Python on every rank, and restore them when resuming.

    Lightning saves no random states. They are restored at the first training batch, because the setup before
    it may draw numbers that the uninterrupted run did not draw. Until then, checkpoints hold them unchanged:
    a finished run that is started again ends without a batch. A run that resumes on a different number of
    ranks cannot restore them, and logs a warning.

    A run that has no states to restore gives each rank but the first a seed of its own for torch, because
    ``seed_everything`` gives all of them one, and their examples would get the same dropout masks.

    Example:
        >>> trainer = Trainer(callbacks=[RNGState()])
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] | None = None  # of all ranks, until they are restored

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all ranks; a collective unless they are still to be restored."""
        return {"ranks": gather_objects(_current()) if self._saved is None else self._saved}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if problem := next(random_state_problems(state_dict, "callbacks.RNGState."), None):
            raise CheckpointError(f"the checkpoint is corrupt: {problem}")
        self._saved = state_dict["ranks"]

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._saved = None  # the states of a checkpoint that was only evaluated do not belong to this run

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved is not None and len(self._saved) == trainer.world_size:
            return
        if trainer.global_rank > 0:
            torch.manual_seed((torch.initial_seed() + _SEED_STEP * trainer.global_rank) % 2**63)
        if self._saved is None:
            return
        if trainer.is_global_zero:
            log.warning(
                "the checkpoint holds the random states of %d ranks, but this run has %d: dropout masks, if "
                "any, differ from those of an uninterrupted run; adapter, optimizer and data resume exactly",
                len(self._saved),
                trainer.world_size,
            )
        self._saved = None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._saved is not None:
            _restore(self._saved[trainer.global_rank])
            self._saved = None


def _current() -> dict[str, Any]:
    """The random states as tensors and plain numbers, which load without unpickling."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
