"""Checks of settings that several data modules share."""

from collections.abc import Sequence


def integer_problems(name: str, value: int | None, *, optional: bool = False) -> list[str]:
    """Return the problem of a setting that has to be at least 1 (or None, if optional), or an empty list."""
    if (value is None and optional) or (value is not None and value >= 1):
        return []
    return [f"data.{name}: {value}; accepted: {'null, or ' if optional else ''}an integer of at least 1"]


def subset_problems(name: str, values: Sequence[str], accepted: Sequence[str]) -> list[str]:
    """Return the problem of a list that is empty or has duplicate or unknown elements, or an empty list."""
    if values and len(set(values)) == len(values) and set(values) <= set(accepted):
        return []
    return [f"data.{name}: {values}; accepted: a list of {' and '.join(accepted)}, each at most once"]
