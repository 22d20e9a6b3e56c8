"""JSON without what Python's parser lets pass, such as duplicate keys, or fails on with other errors."""

import json
import re
from typing import Any

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATOR = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")


def parse_json(text: str) -> Any:
    r"""Parse a JSON text.

    Raises:
        json.JSONDecodeError: The text is not JSON.
        ValueError: A key occurs twice in an object; an integer has too many digits for Python; a text has
            half of a surrogate pair (``"\ud83d"``), which stands for no character; or values are nested too
            deeply. ``NaN`` and ``Infinity`` are read as Python writes them, for tasks to refuse.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None
    if _ESCAPED_SURROGATE.search(text) and (found := _lone_surrogate(value)):
        raise ValueError(
            f"{found[0]}has \\u{ord(found[1]):04x}, half of a surrogate pair, which stands for no character"
        )
    return value


def first_invalid_element(text: str) -> int:
    """Return the number, from 1, of the first element of a JSON list that :func:`parse_json` refuses."""
    position, number = text.index("[") + 1, 1
    while True:
        separator = _SEPARATOR.match(text, position)
        position = separator.end() if separator else position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return number
        if _lone_surrogate(value):
            return number
        number += 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return found


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python limits the digits that it converts
        raise ValueError(f"an integer of {len(text.lstrip('-')):,} digits is too large") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _lone_surrogate(value: Any) -> tuple[str, str] | None:
    """Find half of a surrogate pair: the field that has it (``field 'text': ``), and the character."""
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        field, found = pending.pop()
        if isinstance(found, str) and (half := _SURROGATE.search(found)):
            return field, half[0]
        if isinstance(found, list):
            pending += [(field, element) for element in found]
        elif isinstance(found, dict):
            for key, element in found.items():
                pending += [("a key ", key), (f"field {key!a:.60} ", element)]
    return None
