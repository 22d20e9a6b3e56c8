"""All ranks read the same checkpoint, or none of them reads any."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gatera_lightning.checkpointing.sharded_format import map_tensors
from gatera_lightning.distributed.gather import gather_objects, run_on_every_rank
from gatera_lightning.errors import CheckpointError, ConfigError, as_yaml

_COMPARED = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")
"""Entries of a checkpoint that have to be equal on all ranks."""


def read_alike(path: str | None, read: Callable[[], Mapping[str, Any] | None]) -> None:
    """Read a checkpoint on every rank, and refuse ranks with different ones. Collective.

    Ranks agree whether they read one before any does, because the rest of a run's start is collective: a rank
    that fails or goes on alone would leave the others waiting. Paths may differ, as with a copy of the
    checkpoint on each node.

    Args:
        path: Where this rank's checkpoint is; None if it has none.
        read: Reads it, and returns its entries.

    Raises:
        CheckpointError: On every rank, if only some ranks have a checkpoint, or one cannot read its own.
        ConfigError: On every rank, if the contents differ.
    """
    if not torch.distributed.is_initialized():
        read()
        return
    paths = gather_objects(path)
    if None in paths and any(found is not None for found in paths):
        raise CheckpointError(
            f"ckpt_path: {_by_rank(map(as_yaml, paths))}; accepted: the same checkpoint on every rank, or "
            "null on every rank"
        )
    entries: list[Mapping[str, Any] | None] = []
    failure = run_on_every_rank(
        lambda: entries.append(read()), catch=(CheckpointError, OSError, RuntimeError, ValueError)
    )
    if failure is not None:
        raise CheckpointError(failure)
    if path is None or entries[0] is None:
        return
    digests = gather_objects(state_digest([entries[0].get(name) for name in _COMPARED]))
    if len(set(digests)) > 1:
        pairs = zip(paths, digests, strict=True)
        found = (f"{as_yaml(own)} (SHA-256 {digest[:16]})" for own, digest in pairs)
        raise ConfigError(
            f"ckpt_path: {_by_rank(found)}; accepted: the same checkpoint on every rank", on_every_rank=True
        )


def state_digest(state: Any) -> str:
    """Return the SHA-256 of nested dictionaries and lists of plain values and tensors."""
    digest = hashlib.sha256()

    def add(name: str, tensor: torch.Tensor) -> str:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"{tensor.dtype} {tuple(tensor.shape)}"

    digest.update(repr(map_tensors(state, add)).encode())
    return digest.hexdigest()


def _by_rank(found: Iterable[str]) -> str:
    return ", ".join(f"rank {rank} has {text}" for rank, text in enumerate(found))
