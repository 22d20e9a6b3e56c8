"""What an entry of a checkpoint may be: tests of its type and range, and what they accept in words."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Accepted = tuple[Callable[[Any], bool], str]
"""A test of a value, and what it accepts in words."""


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_number(value: Any) -> bool:
    """Return whether a value is a number."""
    return type(value) in (int, float)


def is_score(value: Any) -> bool:
    """Return whether a value is a number or a tensor of one."""
    return is_number(value) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the test of a list by the test of its items."""
    return lambda value: isinstance(value, list) and all(map(accepts, value))


COUNT: Accepted = (is_count, "an integer of at least 0")
FLOATS: Accepted = (
    lambda value: isinstance(value, Tensor) and value.is_floating_point(),
    "a tensor of floating-point numbers",
)
INTEGERS: Accepted = (list_of(lambda value: type(value) is int), "a list of integers")
KEYS: Accepted = (list_of(lambda value: type(value) in (int, str)), "a list of integers or names")
MAPPING: Accepted = (is_mapping, "a mapping")
MAPPINGS: Accepted = (list_of(is_mapping), "a list of mappings")
MAPPING_OR_TEXT: Accepted = (lambda value: is_mapping(value) or is_text(value), "a mapping or text")
NUMBER: Accepted = (is_number, "a number")
NUMBERS: Accepted = (list_of(is_score), "a list of numbers")
POSITIVE: Accepted = (lambda value: is_count(value) and value > 0, "an integer of at least 1")
SCORE: Accepted = (is_score, "a number, or a tensor of one number")
TENSOR: Accepted = (lambda value: isinstance(value, Tensor), "a tensor")
TEXT: Accepted = (is_text, "text")
TEXTS: Accepted = (list_of(is_text), "a list of texts")
TEXT_OR_TEXTS: Accepted = (lambda value: is_text(value) or TEXTS[0](value), "text or a list of texts")


def wrong(
    entries: Mapping[str, Any], accepted: Mapping[Any, Accepted], place: str, *, required: bool = True
) -> Iterator[str]:
    """Yield a sentence for each entry that is not accepted.

    Args:
        entries: The entries.
        accepted: What some of them may be, by name.
        place: The place of the entries in the checkpoint, with a dot at the end; empty at the top.
        required: Whether a missing entry is a problem too.
    """
    for name, (accepts, description) in accepted.items():
        value = entries.get(name)
        if (required or value is not None) and not accepts(value):
            yield f"its entry {place}{name} is {in_words(value):.60}; accepted: {description}"


def in_words(value: Any) -> str:
    """Return what a message says about a value: its type, and not its contents, if it may be long."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if isinstance(value, Mapping | list) else repr(value)
