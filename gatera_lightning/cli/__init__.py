"""The command line: Lightning's subcommands, this package's own, and what a user sees of both."""

from typing import Any

from gatera_lightning.compatibility import moved_modules

PROGRAM = "python -m gatera_lightning"
"""How usage lines and error messages name the program."""


def __getattr__(name: str) -> Any:
    """Find names that `gatera_lightning.cli` had when it was a module; they are deprecated."""
    return moved_modules.renamed(__name__, name)
