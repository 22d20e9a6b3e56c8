"""Checkpoints on disk: whole or not there at all, flushed before they count, and checked before they are believed.

One file, or (sharded) a folder with the tensors of every process as torch.distributed.checkpoint writes them, the rest in
``rest.pt``, and the SHA-256 of each file in ``files.json``. Reading either gives the same.
"""

import hashlib
import itertools
import json
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from typing_extensions import override

from gatera_lightning.errors import CheckpointError

log = logging.getLogger(__name__)

DRAFT = ".draft"
"""Ends the name of what is still being written; found later, it is what a killed process left."""

_REST, _FILES, _METADATA = "rest.pt", "files.json", ".metadata"  # in a sharded checkpoint
_IS_FOLDER = (
    0x10  # a bit of an archive's entry, with which PyTorch takes a record for read without reading it
)
_SHARDED = "sharded:"  # begins the text that stands for a tensor in rest.pt, before its name among the shards


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a draft, flushes it to the disk, and only then gives it its name: a name always means a whole file.

    A process killed in between leaves the earlier checkpoint and a draft that nobody reads. Reading checks the CRC of every
    record first: ``torch.load`` itself does not notice a flipped bit.
    """

    failure: str | None = None
    """Why the last checkpoint could not be written. Only rank 0 writes; AdapterCheckpoint tells the others and ends the run."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write one file; when that fails, whatever stood there before is untouched and :attr:`failure` says why."""
        path = Path(path)
        self.failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(path.name + DRAFT)
            try:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.is_dir():  # a run whose checkpoints were sharded goes on with whole ones
                    replace_folder(draft, path)
                else:
                    os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
            flush_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failure = (
                f"cannot write the checkpoint {path} ({cause}); what stood there before is untouched"
            )
            log.error(self.failure)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or a sharded folder into whole tensors. Raises CheckpointError when it is damaged."""
        path = Path(path)
        if problem := damage(path):
            raise CheckpointError(f"{path}: {problem}")
        if path.is_dir():
            return read_sharded(path, weights_only=weights_only)
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: it holds objects of other programs ({_line(error)})") from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or folder that may be gone already."""
        _remove(Path(path))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder, which a rename has changed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_folder(path: Path) -> None:
    """An empty folder, whatever stood there."""
    _remove(path)
    path.mkdir(parents=True)


def replace_folder(draft: Path, path: Path) -> None:
    """Let a finished draft take the place of a folder or file; between two renames neither has the name, for which see hold."""
    old = path.with_name(path.name + DRAFT + "-old")
    if path.exists():
        _remove(old)
        os.replace(path, old)
    os.replace(draft, path)
    flush_folder(path.parent)
    _remove(old)


def hold(path: Path) -> Path | None:
    """Let ``NAME.ckpt`` also be ``NAME-held.ckpt`` while it is replaced; None where there is none.

    The file keeps its own name until another takes it: whenever the process is killed, it is there under one or the other.
    """
    held = path.with_name(f"{path.stem}-held{path.suffix}")
    if not path.exists():
        return None
    draft = held.with_name(held.name + DRAFT)
    _remove(draft)
    if path.is_dir():
        shutil.copytree(path, draft, copy_function=_link)
    else:
        _link(path, draft)
    replace_folder(draft, held)
    return held


def keep_previous(held: Path, path: Path, count: int) -> None:
    """Let the one held while ``NAME.ckpt`` was written anew be ``NAME-1.ckpt``, that one ``NAME-2.ckpt``, ``count`` in all."""
    names = [held, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count))]
    for newer, older in reversed(list(itertools.pairwise(names))):
        if newer.exists():
            replace_folder(newer, older)
    _remove(held)


def _link(there: str | Path, here: str | Path) -> None:
    """A second name for a file; a copy where the file system has no such thing."""
    try:
        os.link(there, here)
    except OSError:
        shutil.copy2(there, here)


def mapped(state: Any, change: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Nested dictionaries and lists with every tensor changed; ``change`` gets its path too, like ``state_dict/model.b``."""
    if isinstance(state, dict):
        return {
            key: mapped(value, change, f"{name}/{key}" if name else str(key)) for key, value in state.items()
        }
    if isinstance(state, list | tuple):
        return type(state)(mapped(value, change, f"{name}/{number}") for number, value in enumerate(state))
    return change(name, state) if isinstance(state, Tensor) else state


def write_sharded(checkpoint: dict[str, Any], draft: Path, *, rank: int) -> None:
    """Write every process's shards of the DTensors in ``checkpoint`` into an empty folder, rank 0 all else; a collective."""
    shards: dict[str, Tensor] = {}

    def taken_out(name: str, tensor: Tensor) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        shards[name] = tensor
        return _SHARDED + name

    rest = mapped(checkpoint, taken_out)
    dcp.save(shards, storage_writer=FileSystemWriter(draft, sync_files=True))
    if rank == 0:
        with (draft / _REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        names = sorted(path.name for path in draft.iterdir())
        manifest = draft / _FILES
        manifest.write_text(json.dumps({name: _digest(draft / name) for name in names}, indent=2) + "\n")
        with manifest.open("rb") as written:
            os.fsync(written.fileno())
        flush_folder(draft)


def read_sharded(path: Path, *, weights_only: bool | None = None) -> dict[str, Any]:
    """A sharded checkpoint as one dictionary of whole CPU tensors, on any number of processes, none included."""
    reader = FileSystemReader(path)
    tensors: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    rest = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)

    def put_back(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: put_back(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(map(put_back, state))
        return (
            tensors[state.removeprefix(_SHARDED)]
            if isinstance(state, str) and state.startswith(_SHARDED)
            else state
        )

    return put_back(rest)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, empty when nothing is: every record's CRC, or every file's SHA-256, is checked."""
    if path.is_dir():
        return _damage_of_folder(path)
    if not path.is_file():
        return "there is no such file"
    if not path.stat().st_size:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as records:
            bad = records.testzip()
            bad = bad or next(
                (entry.filename for entry in records.infolist() if entry.external_attr & _IS_FOLDER), None
            )
        if not bad:  # PyTorch reads parts of the archive's directory that zipfile does not
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return ""  # whole, but of foreign classes: for who reads it to judge
    except Exception as error:  # a flipped bit makes zipfile and zlib raise nearly anything
        return f"it is damaged ({_line(error)})"
    return f"it is damaged (record {bad} is not what was written)" if bad else ""


def _damage_of_folder(path: Path) -> str:
    try:
        digests = json.loads((path / _FILES).read_text())
    except (OSError, ValueError) as error:
        return f"it is damaged ({_FILES}: {error})"
    for name in (_REST, _METADATA, *(file.name for file in sorted(path.glob("*.distcp")))):
        if not isinstance(digests, dict) or name not in digests:
            return f"it is damaged ({_FILES} does not list {name})"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"it is damaged ({name} is missing)"
        if _digest(path / name) != digest:
            return f"it is damaged ({name} is not what was written)"
    try:
        with (path / _METADATA).open("rb") as file:
            _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        return f"it is not to be trusted ({_METADATA}: {_line(error)})"
    return ""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what torch.distributed.checkpoint pickles about shards; refuses anything else that a pickle could name and run."""

    def find_class(self, module: str, name: str) -> Any:
        # By whole names: pickle follows dots, and these modules import others, such as os.
        if not ((module, name) in _METADATA_NAMES or (module == "torch" and _is_dtype(name))):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


_METADATA_NAMES = (
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


def _line(error: Exception) -> str:
    """What an exception says, as part of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a folder that has come furthest, damaged ones being named in the log and left out; None without any.

    Raises CheckpointError when there are checkpoints, and every one is damaged.
    """
    found: list[tuple[int, bool, Path]] = []
    paths = sorted(folder.glob("*.ckpt"))
    for path in paths:
        problem = damage(path)
        if not problem:
            try:
                step = _step(path)
            except Exception as error:  # also of a foreign file that happens to have this ending
                problem = f"it cannot be read ({_line(error)})"
        if problem:
            log.warning("skipping the checkpoint %s: %s", path, problem)
        else:
            found.append((step, path.stem == "last", path))
    if paths and not found:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged: {', '.join(path.name for path in paths)}"
        )
    if not found:
        return None
    step, _, newest = max(found)
    log.info("continuing from %s, at optimizer step %d", newest, step)
    return newest


def _step(path: Path) -> int:
    file = path / _REST if path.is_dir() else path
    return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])
