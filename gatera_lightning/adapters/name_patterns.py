"""Match regular expressions against module names in polynomial time, whatever the expression.

Python's ``re`` tries one way after another, and for an expression like ``(.*)*X`` there are exponentially
many. An adapter folder of somebody else could hang a program with it. Here each part of an expression is
evaluated once for each position of the name, and gives all positions at which it can end. Both agree on
whether a whole name matches.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

LONGEST_PATTERN = 1_000
"""Characters; the time to match grows with the length, and a list of names needs no expression."""

SUFFIX = "(?:.*\\.)?"
"""An expression for what may stand before the end of a module's name."""

_UNSUPPORTED = {
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


def pattern_problem(pattern: str) -> str | None:
    """Describe why a regular expression cannot be used; None if it can."""
    if len(pattern) > LONGEST_PATTERN:
        return f"{pattern[:60]!r}… has {len(pattern):,} characters; at most {LONGEST_PATTERN:,} are accepted"
    try:
        re.compile(pattern)
        parsed = _parser.parse(pattern)
        unsupported = {_UNSUPPORTED[name] for name in _operations(parsed) if name in _UNSUPPORTED}
    except (re.error, OverflowError) as error:
        return f"{pattern!r} is not a regular expression ({error})"
    except RecursionError:
        return f"{pattern[:60]!r}… is nested too deeply"
    if unsupported:
        return f"{pattern!r} has {' and '.join(sorted(unsupported))}, which is not supported here"
    return None


def matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches all of a name, as ``re.fullmatch`` would.

    Args:
        pattern: An expression without :func:`pattern_problem`.
        name: The name.
    """
    parsed = _parsed(pattern)
    return len(name) in _Matcher(name).ends(parsed, 0, parsed.state.flags)


def name_ending(name: str) -> str:
    """Return the pattern for modules whose name is ``name`` or ends with it after a dot."""
    return name if re.fullmatch(r"\w+", name) else SUFFIX + re.escape(name)


def ended_name(pattern: str) -> str | None:
    """Return the name that :func:`name_ending` made this pattern of; None for another pattern."""
    plain = pattern.removeprefix(SUFFIX).replace("\\.", ".")
    return plain if pattern == name_ending(plain) else None


def layer_index(name: str) -> int | None:
    """Return the first number in a module's path: ``model.layers.7.mlp.up_proj`` -> 7."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def ending(pattern: str) -> str:
    """Return an expression for all names that end, after a dot or as a whole, with what ``pattern`` matches.

    The keys of ``rank_pattern`` and ``alpha_pattern`` are read so, as in PEFT.
    """
    return rf"(.*\.)?({pattern})"


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """Return the first of several expressions that matches the end of a name; None if none does."""
    return next((pattern for pattern in patterns if matches(ending(pattern), name)), None)


@lru_cache(maxsize=256)
def _parsed(pattern: str) -> Any:
    return _parser.parse(pattern)


def _operations(parsed: Any) -> set[str]:
    """Return the names of all operations in a parsed expression."""
    found = set()
    for operation, argument in parsed:
        found.add(str(operation))
        for part in _parts(argument):
            found |= _operations(part)
    return found


def _parts(argument: Any) -> list[Any]:
    """Return the parsed expressions inside an operation's argument."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    return [part for item in argument for part in _parts(item)] if isinstance(argument, tuple | list) else []


class _Matcher:
    """Finds where the parts of an expression can end in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(self, parsed: Any, start: int, flags: int) -> frozenset[int]:
        """Return every position at which a parsed expression that begins at ``start`` can end."""
        key = id(parsed), start
        if key not in self._known:
            ends = frozenset({start})
            for operation, argument in parsed:
                ends = frozenset().union(*(self._step(str(operation), argument, at, flags) for at in ends))
            self._known[key] = ends
        return self._known[key]

    def _step(self, operation: str, argument: Any, at: int, flags: int) -> frozenset[int]:
        match operation:
            case "MAX_REPEAT" | "MIN_REPEAT":
                key = id(argument), at
                if key not in self._known:
                    least, most, inner = argument
                    self._known[key] = self._repeat(least, most, inner, at, flags)
                return self._known[key]
            case "SUBPATTERN":
                _, added, removed, inner = argument
                return self.ends(inner, at, (flags | added) & ~removed)
            case "BRANCH":
                return frozenset().union(*(self.ends(branch, at, flags) for branch in argument[1]))
            case "ASSERT" | "ASSERT_NOT":
                direction, inner = argument
                start = at if direction > 0 else at - inner.getwidth()[0]
                found = start >= 0 and bool(ends := self.ends(inner, start, flags))
                found = found and (direction > 0 or at in ends)
                return frozenset({at}) if found == (operation == "ASSERT") else frozenset()
            case "AT":
                return frozenset({at}) if self._is_at(str(argument), at, flags) else frozenset()
            case "FAILURE":
                return frozenset()
        matched = at < len(self._text) and _matches_char(operation, argument, self._text[at], flags)
        return frozenset({at + 1}) if matched else frozenset()

    def _repeat(self, least: int, most: Any, inner: Any, at: int, flags: int) -> frozenset[int]:
        reached = frozenset({at})
        for _ in range(least):
            before, reached = reached, frozenset().union(*(self.ends(inner, i, flags) for i in reached))
            if reached == before or not reached:
                break  # further repetitions change nothing
        found, limit = reached, None if most is _constants.MAXREPEAT else most - least
        while reached and (limit is None or limit > 0):
            reached = frozenset().union(*(self.ends(inner, i, flags) for i in reached)) - found
            found |= reached
            limit = None if limit is None else limit - 1
        return found

    def _is_at(self, place: str, at: int, flags: int) -> bool:
        text, last, multiline = self._text, len(self._text), bool(flags & re.MULTILINE)
        if "BOUNDARY" in place:
            is_word = _CATEGORIES["CATEGORY_WORD"]
            before, after = at > 0 and is_word(text[at - 1]), at < last and is_word(text[at])
            return (before != after) == (place == "AT_BOUNDARY")
        if place.startswith("AT_BEGINNING"):
            return at == 0 or (place == "AT_BEGINNING" and multiline and text[at - 1] == "\n")
        if place == "AT_END_STRING":
            return at == last
        return at == last or (text[at] == "\n" and (multiline or at == last - 1))


def _matches_char(operation: str, argument: Any, char: str, flags: int) -> bool:
    """Return whether an operation that reads one character reads this one."""
    if operation == "ANY":
        return char != "\n" or bool(flags & re.DOTALL)
    chars = {char, char.lower(), char.upper()} if flags & re.IGNORECASE else {char}
    if operation != "IN":
        negated = operation == "NOT_LITERAL"
        return any(chr(argument) == each for each in chars) != negated
    negated = str(argument[0][0]) == "NEGATE"
    items = argument[1:] if negated else argument
    return any(_in_set(str(kind), value, each) for kind, value in items for each in chars) != negated


def _in_set(kind: str, value: Any, char: str) -> bool:
    if kind == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    if kind == "LITERAL":
        return bool(value == ord(char))
    category = str(value)
    return _CATEGORIES[category.replace("_NOT", "")](char) != ("_NOT" in category)
