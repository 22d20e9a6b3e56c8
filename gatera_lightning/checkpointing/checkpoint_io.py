"""Lightning's plugin for reading and writing checkpoints: writes are atomic, reads check for corruption."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from gatera_lightning.checkpointing.atomic_files import atomic_file, remove
from gatera_lightning.checkpointing.contents import not_allowed
from gatera_lightning.checkpointing.integrity import find_corruption
from gatera_lightning.checkpointing.sharded_format import read_sharded
from gatera_lightning.errors import CheckpointError

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, flushes it to the disk, then renames it.

    A process that is killed while writing leaves the previous checkpoint and a temporary file that is
    never read.

    Attributes:
        failure: Why the last checkpoint could not be written; None if it was. Only rank 0 writes, so an
            exception would leave the other ranks waiting.
            :class:`~gatera_lightning.callbacks.AdapterCheckpoint` broadcasts the failure and ends the run on
            all ranks.
    """

    failure: str | None = None

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint file; on failure set :attr:`failure` and keep the previous checkpoint."""
        path = Path(path)
        self.failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failure = (
                f"cannot write the checkpoint {path} ({cause}); the previous checkpoint is unchanged"
            )
            log.error(self.failure)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint file, or a sharded checkpoint as unsharded tensors.

        Raises:
            CheckpointError: The checkpoint is missing, corrupt, or holds classes that are not allowed.
        """
        path = Path(path)
        if problem := find_corruption(path):
            raise CheckpointError(f"{path}: {problem}")
        try:
            if path.is_dir():
                return read_sharded(path, weights_only=weights_only)
            return super().load_checkpoint(path, map_location, weights_only)
        except pickle.UnpicklingError as error:
            raise not_allowed(path, error) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, if it exists."""
        remove(Path(path))
