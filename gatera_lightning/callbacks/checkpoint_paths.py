"""Which files a checkpoint may name as the checkpoints of a callback, which the callback will remove."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from gatera_lightning.errors import CheckpointError

log = logging.getLogger(__name__)


def owns(callback: ModelCheckpoint, path: Any) -> bool:
    """Return whether a path is a checkpoint in a callback's folder or below it, symbolic links resolved."""
    if callback.dirpath is None or not isinstance(path, str) or "\0" in path:
        return False
    folder, resolved = Path(callback.dirpath).resolve(), Path(path).resolve()
    extensions = {Path(path).suffix, resolved.suffix}
    return folder in resolved.parents and extensions == {callback.FILE_EXTENSION}


def own_paths_only(callback: ModelCheckpoint, state: Any) -> dict[str, Any]:
    """Return a callback's state from a checkpoint without files that are not its own.

    The callback removes the files of its state when better ones replace them.

    Args:
        callback: The callback, whose folder is known.
        state: Its state in a checkpoint; unchanged.

    Raises:
        CheckpointError: The state cannot be one of a ModelCheckpoint.
    """
    best = state.get("best_k_models", {}) if isinstance(state, dict) else None
    if not isinstance(best, dict):
        raise CheckpointError(
            f"the checkpoint's state of {type(callback).__name__} is not a mapping of names"
        )
    own = {path: score for path, score in best.items() if owns(callback, path)}
    kept = dict(state)
    if len(own) < len(best):
        log.warning(
            "the checkpoint names best checkpoints outside of %s, which are ignored", callback.dirpath
        )
    if len(own) < len(best) or kept.get("kth_best_model_path", "") not in ("", *own):
        worst = max if callback.mode == "min" else min
        kept |= {
            "best_k_models": own,
            "kth_best_model_path": worst(own, key=own.__getitem__, default=""),
        }
        kept["kth_value"] = own.get(kept["kth_best_model_path"], callback.kth_value)
    removed_next = ["last_model_path", *(["best_model_path"] if callback.monitor is None else [])]
    for name in removed_next:
        if not owns(callback, kept.get(name)):
            kept[name] = ""
    return kept


def keep_own_paths(checkpoint: dict[str, Any], callbacks: Iterable[Any]) -> None:
    """Remove files that are not a callback's own from the states of all checkpoint callbacks, in place.

    Args:
        checkpoint: A checkpoint, before Lightning restores its callbacks.
        callbacks: The callbacks of the run, after their set-up.

    Raises:
        CheckpointError: A state cannot be one of a ModelCheckpoint.
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
            states[callback.state_key] = own_paths_only(callback, states[callback.state_key])
