"""Nulls that Arrow writes where JSON has no key."""

from typing import Any


def without_added_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the null fields of its nested objects; columns that are null stay.

    All objects of an Arrow column have the same fields, so those that an object lacks are null in it. They
    cannot be told from nulls that the data had, which are dropped too.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
