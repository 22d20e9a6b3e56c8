"""Checks of settings that several data modules share."""

from collections.abc import Sequence
from typing import Any

MOST = 2**31 - 1
"""Largest value of settings that count examples or tokens: they become 32-bit integers."""

MOST_SEED = 2**32 - 1
"""Largest seed that NumPy, PyTorch and Lightning accept alike."""

MOST_WORKERS = 1_024
"""More worker processes than any machine runs."""


def integer_problems(
    name: str, value: Any, *, least: int = 1, most: int = MOST, optional: bool = False
) -> list[str]:
    """Return the problem of a setting that has to be an integer, or an empty list.

    Args:
        name: Name of the setting.
        value: Its value.
        least: Smallest accepted value.
        most: Largest accepted value.
        optional: Whether None is accepted.
    """
    if value is None and optional:
        return []
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return []
    too_large = isinstance(value, int) and value > most
    limit = f", at most {most:,}" if too_large else ""
    accepted = f"{'null, or ' if optional else ''}an integer of at least {least}{limit}"
    return [f"data.{name}: {shown(value)}; accepted: {accepted}"]


def boolean_problems(name: str, value: Any) -> list[str]:
    """Return the problem of a setting that has to be true or false, or an empty list."""
    return [] if isinstance(value, bool) else [f"data.{name}: {shown(value)}; accepted: true, false"]


def subset_problems(name: str, values: Sequence[Any], accepted: Sequence[str]) -> list[str]:
    """Return the problem of a list that is empty or has duplicate or unknown elements, or an empty list."""
    texts = [value for value in values if isinstance(value, str)]
    if values and len(set(texts)) == len(values) and set(texts) <= set(accepted):
        return []
    return [f"data.{name}: {shown(values)}; accepted: a list of {' and '.join(accepted)}, each at most once"]


def shown(value: Any) -> str:
    """Return a value as messages show it: shortened, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:99]}…"
