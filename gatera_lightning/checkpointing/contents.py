"""Read what a checkpoint says about its run, and nothing that belongs to another program."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gatera_lightning.checkpointing.entry_types import entry_problems
from gatera_lightning.checkpointing.integrity import find_corruption, one_line
from gatera_lightning.checkpointing.sharded_format import REST, with_meta_tensors
from gatera_lightning.errors import CheckpointError

_ADAPTER_ENTRIES = ("state_dict", "adapter", "backbone")
"""Entries that every checkpoint of an adapter has."""

_RESUME_ENTRIES = ("global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
"""Entries that resuming a run needs as well."""

_BACKBONE_ENTRIES = ("id", "revision", "fingerprint")


def read_contents(path: Path) -> dict[str, Any]:
    """Read a checkpoint, and unpickle nothing but plain values and tensors.

    Args:
        path: A checkpoint file, or the folder of a sharded checkpoint.

    Returns:
        The entries. Tensors of a file stay on the disk until they are used; sharded ones are on the meta
        device.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable or corrupt, or holds other classes.
    """
    if problem := find_corruption(path):
        raise CheckpointError(f"{path}: {problem}")
    file = path / REST if path.is_dir() else path
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise not_allowed(path, error) from error
    except Exception as error:  # another program's archive may raise anything
        raise CheckpointError(f"{path}: it cannot be read ({one_line(error)})") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: it holds a {type(contents).__name__}, not a checkpoint")
    return with_meta_tensors(contents, path) if path.is_dir() else contents


def check_entries(contents: dict[str, Any], source: str | Path, *, resumes: bool = False) -> None:
    """Check that a checkpoint holds an adapter and says where it belongs.

    Args:
        contents: The entries of the checkpoint.
        source: Where it is stored, for the error message.
        resumes: Whether it has to resume a run, so that the weights alone are not enough.

    Raises:
        CheckpointError: An entry is missing or has another type.
    """
    if missing := _missing(contents, _ADAPTER_ENTRIES):
        raise CheckpointError(
            f"{source}: this is not a checkpoint of an adapter; it lacks {', '.join(missing)}"
        )
    if resumes and (missing := _missing(contents, _RESUME_ENTRIES)):
        raise CheckpointError(
            f"{source}: this checkpoint cannot resume a run; it lacks {', '.join(missing)}. A new run can "
            "start from an adapter folder with model.warm_start"
        )
    if problem := next(entry_problems(contents, resumes=resumes), None):
        raise CheckpointError(f"{source}: the checkpoint is corrupt: {problem}")
    if missing := [name for name in _BACKBONE_ENTRIES if name not in contents["backbone"]]:
        raise CheckpointError(f"{source}: its entry backbone lacks {', '.join(missing)}")


def not_allowed(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that holds other classes than plain values and tensors."""
    return CheckpointError(f"{path}: it contains pickled classes that are not allowed ({one_line(error)})")


def _missing(contents: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if contents.get(name) is None]
