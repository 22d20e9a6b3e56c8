"""Keep a run's previous checkpoints: ``last.ckpt`` becomes ``last-1.ckpt``, which becomes ``last-2.ckpt``.

A process may be killed at any moment. Therefore the newest checkpoint always has a name ending in ``.ckpt``,
also while its successor is written and renamed.
"""

import itertools
import os
import shutil
from pathlib import Path

from gatera_lightning.checkpointing.atomic_files import remove, replace, temporary_path


def hold_current(path: Path) -> Path | None:
    """Give a checkpoint the second name ``NAME-held.ckpt`` before a new one replaces it.

    Args:
        path: The checkpoint ``NAME.ckpt``, a file or a folder. It keeps this name until the new one takes it.

    Returns:
        The second name, or None if there is no checkpoint yet.
    """
    if not path.exists():
        return None
    held = path.with_name(f"{path.stem}-held{path.suffix}")
    temporary = temporary_path(held)
    remove(temporary)
    if path.is_dir():
        shutil.copytree(path, temporary, copy_function=_link)
    else:
        _link(path, temporary)
    replace(temporary, held)
    return held


def rotate(held: Path, path: Path, keep: int) -> None:
    """Rename the held checkpoint to ``NAME-1.ckpt``, and each earlier one to the next number.

    Args:
        held: What :func:`hold_current` returned.
        path: The new checkpoint ``NAME.ckpt``.
        keep: How many checkpoints to keep, the new one included. Older ones are removed.
    """
    names = [held, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, keep))]
    for newer, older in reversed(list(itertools.pairwise(names))):
        if newer.exists():
            replace(newer, older)
    remove(held)


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
