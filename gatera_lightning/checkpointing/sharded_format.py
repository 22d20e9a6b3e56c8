"""Sharded checkpoints: a folder with the tensors of every rank and everything else beside them.

The folder holds

- ``*.distcp`` and ``.metadata``: the shards, as torch.distributed.checkpoint writes them;
- ``rest.pt``: the checkpoint as ``torch.save`` writes it, with the text ``sharded:NAME`` in place of every
  sharded tensor;
- ``files.json``: the SHA-256 of each of these files.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from gatera_lightning.checkpointing.atomic_files import flush

REST = "rest.pt"
DIGESTS = "files.json"
METADATA = ".metadata"

_PLACEHOLDER = "sharded:"


def write_sharded(checkpoint: dict[str, Any], folder: Path, *, rank: int) -> None:
    """Write a checkpoint into an empty folder. Collective: every rank calls it.

    Args:
        checkpoint: Nested dictionaries and lists. Every rank writes its shards of the DTensors; rank 0 writes
            the rest.
        folder: An empty folder that all ranks see.
        rank: This process's rank.
    """
    shards: dict[str, Tensor] = {}

    def take_out(name: str, tensor: Tensor) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        shards[name] = tensor
        return _PLACEHOLDER + name

    rest = map_tensors(checkpoint, take_out)
    save(shards, storage_writer=FileSystemWriter(folder, sync_files=True))
    if rank == 0:
        with (folder / REST).open("wb") as file:
            torch.save(rest, file)
        flush(folder / REST)
        names = sorted(path.name for path in folder.iterdir())
        digests = {name: sha256(folder / name) for name in names}
        (folder / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
        flush(folder / DIGESTS)
        flush(folder)


def read_sharded(folder: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a sharded checkpoint in one process.

    Args:
        folder: The checkpoint, written by any number of ranks.
        weights_only: As in ``torch.load``, for the part that is not sharded.

    Returns:
        The checkpoint with unsharded CPU tensors.
    """
    tensors = _empty_tensors(folder, "cpu")
    load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=weights_only)
    restored: dict[str, Any] = _put_back(rest, tensors)
    return restored


def with_meta_tensors(rest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what ``rest.pt`` of a sharded checkpoint holds, with meta tensors for the sharded ones."""
    described: dict[str, Any] = _put_back(rest, _empty_tensors(folder, "meta"))
    return described


def _empty_tensors(folder: Path, device: str) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # write_sharded writes tensors only
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
    return tensors


def _put_back(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors in place of the texts that stand for them; a text that stands for none is left."""
    if isinstance(state, dict):
        return {key: _put_back(value, tensors) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_put_back(value, tensors) for value in state)
    if isinstance(state, str) and state.startswith(_PLACEHOLDER):
        return tensors.get(state.removeprefix(_PLACEHOLDER), state)
    return state


def map_tensors(state: Any, function: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Replace every tensor in nested dictionaries, lists and tuples.

    Args:
        state: The nested state; it is not changed.
        function: Called with the tensor's path, such as ``state_dict/model.lm_head.a``, and the tensor.
        name: The path of ``state`` itself.

    Returns:
        A copy of ``state`` with what ``function`` returned in place of each tensor.
    """
    if isinstance(state, dict):
        return {
            key: map_tensors(value, function, f"{name}/{key}" if name else str(key))
            for key, value in state.items()
        }
    if isinstance(state, list | tuple):
        items = (map_tensors(value, function, f"{name}/{index}") for index, value in enumerate(state))
        return type(state)(items)
    return function(name, state) if isinstance(state, Tensor) else state


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_metadata(folder: Path) -> None:
    """Unpickle the description of the shards and allow nothing but the classes that torch writes into it.

    ``FileSystemReader`` unpickles the file without any restriction, so it must be checked first.

    Raises:
        pickle.UnpicklingError: The file names something else, which reading it could run.
    """
    with (folder / METADATA).open("rb") as file:
        _MetadataUnpickler(file).load()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Compare full names: pickle follows dots in `name`, and an allowed module may itself have imported
        # `os`.
        if not ((module, name) in _ALLOWED_NAMES or (module == "torch" and _is_dtype(name))):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")
        return super().find_class(module, name)


_ALLOWED_NAMES = (
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
)


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)
