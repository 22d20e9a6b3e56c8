"""The exceptions that end a run, each with a message for the user, and the wording that messages share."""

import difflib
import functools
import inspect
import math
import re
import signal
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")

# Control characters except tab and line break, surrogates, and characters that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Escape characters that would control a terminal, as JSON does: ESC becomes `\u001b`."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def near_miss(value: object, accepted: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` if an accepted name is close to ``value``, else an empty string."""
    close = difflib.get_close_matches(value, list(accepted), n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close and close[0] != value else ""


def unknown_value(setting: str, value: object, accepted: Iterable[str]) -> str:
    """Describe a setting whose value is not one of the accepted names, with the closest of them.

    Args:
        setting: Name of the setting.
        value: Its value; None if it is not set.
        accepted: The accepted names.
    """
    names = list(accepted)
    reason = "is not set" if value is None else f"{value!r} is unknown"
    return f"{setting}: {reason}; accepted: {', '.join(names)}{near_miss(value, names)}"


def as_yaml(value: Any) -> str:
    """Write a value as a config does: ``null``, ``true``, ``[1, 'a']``; texts have quotes."""
    match value:
        case Enum():
            return as_yaml(value.value)
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case list() | tuple():
            return f"[{', '.join(map(as_yaml, value))}]"
        case Mapping():
            return f"{{{', '.join(f'{name}: {as_yaml(entry)}' for name, entry in value.items())}}}"
    return repr(value)


def type_problems(section: str, settings: Any) -> dict[str, str]:
    """Describe every field of a settings class whose value is not of its annotated type.

    True is not a number, and a setting that is a number is neither NaN nor infinite. A subclass's own types
    are not checked.

    Args:
        section: Name of the section in configs.
        settings: An instance of a dataclass.

    Returns:
        Name of each such field -> a message that names the setting, its value and what is accepted.
    """
    found = {}
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if get_origin(hint) is Literal and (not isinstance(value, str) or value not in get_args(hint)):
            found[field.name] = unknown_value(f"{section}.{field.name}", value, get_args(hint))
        elif not _has_type(value, hint):
            accepted = f"{_accepted(hint)}{_without_quotes(value, hint)}"
            found[field.name] = f"{section}.{field.name}: {value!r:.60}; accepted: {accepted}"
    return found


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise TypeError, with a sentence, if an argument has another type than annotated.

    Args:
        function: The function, or the ``__init__`` of a class.
        arguments: Values by argument name; other names are ignored.
    """
    name = function.__qualname__.removesuffix(".__init__")
    for argument, hint in _hints(function).items():
        value = arguments.get(argument)
        if argument in arguments and not _has_type(value, hint):
            found = f"{value.__name__} itself" if isinstance(value, type) else f"{value!r:.60}"
            raise TypeError(f"{name}: {argument} is {found}; accepted: {_accepted(hint)}")


def checks_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Let a public function check the types of its arguments; see :func:`check_arguments`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:  # Python's own message also names the function
            return function(*args, **kwargs)
        check_arguments(function, arguments)
        return function(*args, **kwargs)

    return checked


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _has_type(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    match hint:
        case _ if origin in (Union, types.UnionType):
            return any(_has_type(value, choice) for choice in get_args(hint))
        case _ if hint is int:
            return isinstance(value, int) and not isinstance(value, bool)
        case _ if hint is float:
            return _has_type(value, int) or (isinstance(value, float) and math.isfinite(value))
        case _ if origin is Literal or hint is Any:
            return True
    if origin is list:
        (element,) = get_args(hint)
        return isinstance(value, list) and all(_has_type(item, element) for item in value)
    expected = origin or hint
    return not isinstance(expected, type) or isinstance(value, expected)


def _without_quotes(value: Any, hint: Any) -> str:
    """Return a hint if a text would be a number of the accepted type."""
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else None
        except ValueError:
            continue
        if number is not None and _has_type(number, hint):
            return f"; {value!r} is a text: write {number!r} without quotes"
    return ""


def _accepted(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return ", or ".join(_accepted(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"a list of {getattr(get_args(hint)[0], '__name__', 'values')}"
    names = {
        bool: "true, false",
        int: "an integer",
        float: "a finite number",
        str: "text",
        types.NoneType: "null",
    }
    name = getattr(get_origin(hint) or hint, "__name__", str(hint))
    return names.get(hint, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


class ConfigError(ValueError):
    """A configuration that cannot work.

    Args:
        problems: Every problem that was found; each names the setting, its value and what is accepted.
        on_every_rank: Whether all ranks raise the error together, so that only one needs to print it.
    """

    def __init__(self, problems: str | Sequence[str], *, on_every_rank: bool = False) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.on_every_rank = on_every_rank
        several = len(self.problems) > 1
        super().__init__("\n".join(f"  - {p}" for p in self.problems) if several else self.problems[0])


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient of an optimizer step is NaN or infinite; the step was not taken."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is corrupt, or does not belong to this run."""


class Preempted(RuntimeError):
    """A signal ended the run after its progress was saved.

    Args:
        checkpoint: Path of the checkpoint.
        step: Optimizer steps that it holds.
        requeued: Whether the SLURM job starts again by itself.
    """

    def __init__(self, checkpoint: str, step: int, *, requeued: bool) -> None:
        self.checkpoint, self.step, self.requeued = checkpoint, step, requeued
        then = (
            "the job is requeued and resumes from there"
            if requeued
            else f"resume with --ckpt_path {checkpoint}"
        )
        super().__init__(f"preempted at optimizer step {step}; saved {checkpoint}; {then}")


class Interrupted(BaseException):
    """A signal ended the program; nothing but exiting may follow.

    Args:
        number: The signal.
        activity: What was being done, such as ``test``; empty if unknown.
        unfinished: Whether work is left; false for what only a signal ends.
    """

    def __init__(self, number: int, activity: str = "", *, unfinished: bool = True) -> None:
        self.number, self.activity = number, activity
        during = f" during {activity}" if activity else ""
        rest = "; its work is not complete" if unfinished else ""
        super().__init__(f"ended by {signal.Signals(number).name}{during}{rest}")


class AdapterFileError(ValueError):
    """An adapter folder is incomplete or corrupt, or belongs to another backbone or method."""
