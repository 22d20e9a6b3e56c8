"""What is wrong with the settings that choose layers, before any model is known."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from gatera_lightning.adapters.gates import is_finite_number
from gatera_lightning.adapters.name_patterns import ending, pattern_problem
from gatera_lightning.errors import near_miss

ALL_LINEAR: Final = "all-linear"


def module_problems(target_modules: Any, exclude_modules: Any, layers: Any) -> list[str]:
    """Describe what is wrong with the settings that choose modules; empty if nothing is."""
    found = []
    if target_modules == [] or not isinstance(target_modules, list | str):
        found.append(
            f"adapter.target_modules: {target_modules!r}; "
            f"accepted: a list of at least one name or regex, or {ALL_LINEAR}"
        )
    elif isinstance(target_modules, str) and target_modules != ALL_LINEAR:
        found.append(
            f"adapter.target_modules: {target_modules!r} is no list; accepted: a list of names and "
            f"regexes, or {ALL_LINEAR}{near_miss(target_modules, [ALL_LINEAR])}"
        )
    elif ALL_LINEAR in target_modules and target_modules != ALL_LINEAR:
        found.append(f"adapter.target_modules: {target_modules!r}; accepted: {ALL_LINEAR} without a list")
    if not isinstance(exclude_modules, list):
        found.append(f"adapter.exclude_modules: {exclude_modules!r}; accepted: a list of names and regexes")
    for name, patterns in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if isinstance(patterns, list):
            found += [f"adapter.{name}: {text}" for text in map(_regex_problem, patterns) if text]
    if layers is not None and not (isinstance(layers, list) and layers and all(map(is_int, layers))):
        found.append(f"adapter.layers: {layers!r}; accepted: null for all, or a list of indices")
    return found


def pattern_problems(rank_pattern: Any, alpha_pattern: Any) -> list[str]:
    """Describe what is wrong with the ranks and alphas of single modules; empty if nothing is."""
    found = []
    accepted: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
        "rank_pattern": (rank_pattern, "an integer of at least 1", lambda rank: is_int(rank) and rank >= 1),
        "alpha_pattern": (
            alpha_pattern,
            "a number above 0",
            lambda alpha: is_finite_number(alpha) and alpha > 0,
        ),
    }
    for name, (patterns, values, is_accepted) in accepted.items():
        if not isinstance(patterns, Mapping):
            found.append(f"adapter.{name}: {patterns!r}; accepted: a table of names of modules")
            continue
        for key, value in patterns.items():
            if problem := _regex_problem(key) or pattern_problem(ending(key)):
                found.append(f"adapter.{name}: {problem}")
            if not is_accepted(value):
                found.append(f"adapter.{name}.{key}: {value!r}; accepted: {values}")
    return found


def is_int(value: Any) -> bool:
    """Return whether a value is an int; a bool is not one here."""
    return isinstance(value, int) and not isinstance(value, bool)


def _regex_problem(pattern: Any) -> str | None:
    if not isinstance(pattern, str):
        return f"{pattern!r} is not a string"
    return pattern_problem(pattern)
