"""Check that checkpoints are intact, and find the newest valid one of a run."""

import json
import logging
import pickle
import zipfile
from pathlib import Path

import torch

from gatera_lightning.checkpointing.sharded_format import DIGESTS, METADATA, REST, check_metadata, sha256
from gatera_lightning.errors import CheckpointError

log = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoints"
"""The folder of checkpoints inside a run's folder, as Lightning names it."""

_IS_FOLDER = 0x10
"""Attribute of a zip archive's entry. If a tensor's entry has it, PyTorch returns uninitialized memory."""


def find_corruption(path: Path) -> str | None:
    """Check every byte of a checkpoint that a reader would use.

    ``torch.load`` does not notice a flipped bit. Here the CRC of every record of a file is checked, or the
    SHA-256 of every file of a sharded checkpoint.

    Args:
        path: A checkpoint file, or the folder of a sharded checkpoint.

    Returns:
        What is wrong with the checkpoint; None if it is valid.
    """
    if path.is_dir():
        return _corruption_of_folder(path)
    if not path.is_file():
        return "there is no such file"
    if not path.stat().st_size:
        return "the file is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            bad = bad or next(
                (entry.filename for entry in archive.infolist() if entry.external_attr & _IS_FOLDER), None
            )
        if not bad:  # PyTorch reads parts of the archive's directory that zipfile does not check
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return None  # intact, but it holds other classes; loading decides whether to trust them
    except OSError as error:
        return f"it cannot be read ({error.strerror or one_line(error)})"
    except Exception as error:  # a flipped bit makes zipfile and zlib raise nearly anything
        return f"the file is corrupt ({one_line(error)})"
    return f"the file is corrupt (record {bad} does not match its checksum)" if bad else None


def newest_valid_checkpoint(folder: Path) -> Path | None:
    """Find the valid checkpoint with the most optimizer steps; of several, prefer ``last.ckpt``.

    Corrupt checkpoints are skipped with a warning.

    Args:
        folder: A run's folder of ``*.ckpt`` files and folders.

    Returns:
        The checkpoint, or None if the folder has none.

    Raises:
        CheckpointError: There are checkpoints and all of them are corrupt.
    """
    found: list[tuple[int, bool, Path]] = []
    paths = sorted(folder.glob("*.ckpt"))
    for path in paths:
        problem = find_corruption(path)
        if problem is None:
            try:
                step = _global_step(path)
            except Exception as error:  # another program's file with the same suffix may raise anything
                problem = f"it cannot be read ({one_line(error)})"
        if problem is not None:
            log.warning("skipping the checkpoint %s: %s", path, problem)
        else:
            found.append((step, path.stem == "last", path))
    if paths and not found:
        raise CheckpointError(
            f"{folder}: every checkpoint is corrupt: {', '.join(path.name for path in paths)}"
        )
    if not found:
        return None
    step, _, newest = max(found)
    log.info("newest valid checkpoint: %s, at optimizer step %d", newest, step)
    return newest


def one_line(error: Exception) -> str:
    """Return an exception's message, or its type if it has none, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _corruption_of_folder(folder: Path) -> str | None:
    try:
        digests = json.loads((folder / DIGESTS).read_text())
    except PermissionError as error:
        return f"it cannot be read ({DIGESTS}: {error.strerror})"
    except (OSError, ValueError) as error:
        return f"the checkpoint is corrupt ({DIGESTS}: {error})"
    for name in (REST, METADATA, *(file.name for file in sorted(folder.glob("*.distcp")))):
        if not isinstance(digests, dict) or name not in digests:
            return f"the checkpoint is corrupt ({DIGESTS} does not list {name})"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"the checkpoint is corrupt ({name} is missing)"
        try:
            found = sha256(folder / name)
        except OSError as error:
            return f"it cannot be read ({name}: {error.strerror or one_line(error)})"
        if found != digest:
            return f"the checkpoint is corrupt ({name} does not match its checksum)"
    try:
        check_metadata(folder)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        return f"the checkpoint is not safe to load ({METADATA}: {one_line(error)})"
    return None


def _global_step(path: Path) -> int:
    file = path / REST if path.is_dir() else path
    return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])
