"""The available updates, by name.

To add an update, write a subclass of :class:`Update` in a file of its own and pass it to
:func:`register_update`.
"""

from typing import TypeVar

from gatera_lightning.adapters.updates.abba import ABBA
from gatera_lightning.adapters.updates.base import Update
from gatera_lightning.adapters.updates.block_hira import BlockHiRA
from gatera_lightning.adapters.updates.dora import DoRA
from gatera_lightning.adapters.updates.hira import HiRA
from gatera_lightning.adapters.updates.lora import LoRA

__all__ = ["UPDATES", "Update", "describe_updates", "register_update"]

UpdateClass = TypeVar("UpdateClass", bound=type[Update])

UPDATES: dict[str, type[Update]] = {update.name: update for update in (LoRA, DoRA, HiRA, ABBA, BlockHiRA)}
"""The available updates, by name."""


def register_update(update: UpdateClass) -> UpdateClass:
    """Make an update available under its ``name``; usable as a class decorator.

    Raises:
        TypeError: If it is not a subclass of Update.
        ValueError: If another class has this name.
    """
    if not (isinstance(update, type) and issubclass(update, Update)):
        raise TypeError(f"register_update: {update!r:.60}; accepted: a subclass of Update")
    if UPDATES.setdefault(update.name, update) is not update:
        raise ValueError(
            f"an update named {update.name!r} is already registered: {UPDATES[update.name].__name__}"
        )
    return update


def describe_updates() -> str:
    """Return one line that lists every available update with its formula, for ``--help``."""
    return "; ".join(f"{name} = {update.formula}" for name, update in UPDATES.items())
