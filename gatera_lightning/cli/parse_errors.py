"""One sentence for each error of the parsers, instead of a usage dump and a tree of types.

argparse and jsonargparse describe an error as text alone, so the text is what is read here.
"""

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gatera_lightning.cli.error_translation import without_internals
from gatera_lightning.errors import near_miss, unknown_value

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.S)
_UNKNOWN_OPTION = re.compile(r"Subcommand '\w+' does not accept option '(.*)'|No action for key \"?([^\"]*)")
_REQUIRED = re.compile(r"the following arguments are required: (.*)", re.S)
_CHOICE = re.compile(r"argument (.+?): invalid choice: (.+) \(choose from (.*)\)", re.S)
_TYPE = re.compile(r"argument (.+?): invalid (\w+) value: (.*)", re.S)
_ARGUMENT = re.compile(r"argument (.+?): (.*)", re.S)
_KEY = re.compile(r'Parser key "([^"]*)"')
_GIVEN = re.compile(r"(?:Got value|Given value): ?(.*)")
_CLASS = re.compile(r"Problem with given class_path '([^']*)'")
_REJECTED = re.compile(r"Option '([^']*)' is not accepted")
_EXPECTED = re.compile(r"Expected an? (.*?)(?:\. Got value:.*)?$")
_IMPORT_PATH = re.compile(r"Expected a dot import path string: ?(.*)")
_MISSING = re.compile(
    r"No module named .*|module .* has no attribute .*|.*does not correspond to a subclass.*"
)

_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true, false",
    "str": "a text",
    "list": "a list, such as '[a, b]'",
    "dict": "a mapping",
    "NoneType": "null",
}


def describe(parser: argparse.ArgumentParser, message: str) -> str:
    """Describe an error of a parser in one sentence that names the setting, its value and what is accepted.

    Args:
        parser: The parser that found the error.
        message: How argparse or jsonargparse describes it.
    """
    return without_internals(_describe(parser, message.strip()))


def _describe(parser: argparse.ArgumentParser, text: str) -> str:
    if found := _UNRECOGNIZED.fullmatch(text):
        return _unrecognized(parser, found[1])
    if found := _UNKNOWN_OPTION.match(text):
        return unknown_setting((found[1] or found[2]).rstrip('".'), _setting_names(parser))
    if found := _REQUIRED.fullmatch(text):
        names = re.sub(r"\b(fit|validate|test|predict)\.", "", found[1])
        recipe = "; give a recipe, such as --config quickstart.yaml" if "data" in names.split(", ") else ""
        return f"{names}: required, but not given{recipe}"
    if found := _CHOICE.fullmatch(text):
        accepted = re.findall(r"'([^']*)'", found[3]) or found[3].split(", ")
        name = "COMMAND" if found[1] == "subcommand" else found[1]
        return unknown_value(name, found[2].strip("'"), accepted)
    if found := _TYPE.fullmatch(text):
        return f"{found[1]}: {found[3]}; accepted: {_TYPES.get(found[2], found[2])}"
    if text.startswith("Unexpected config:"):
        value = text.partition(":")[2].strip()
        return f"--config: {value!r:.60}; accepted: a mapping of settings, such as 'trainer: …'"
    if found := re.match(r'Spaces not allowed in keys: "(.*)"|Key must be a string, got: (.*?)\.?$', text):
        reason = f"{found[1]!r} holds a space" if found[1] else f"{found[2]} is no text"
        return f"--config: the key {reason}; accepted: names of settings"
    if found := re.fullmatch(r'Invalid option "(.*)" for (.*)', text):
        return f"{found[2]}: {found[1]!r}; accepted: {found[2]} or {found[2]}=skip_default"
    if text.startswith("Parser key"):
        return _describe_tree(parser, text)
    if found := _ARGUMENT.fullmatch(text):
        reason = " ".join(found[2].split())
        return f"{found[1]}: {reason.replace('expected one argument', 'has no value; expected one')}"
    return " ".join(text.split())


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """Describe a setting that does not exist, with the closest one that does.

    Args:
        name: The setting, or a flag with its dashes.
        known: All settings, with dashes if ``name`` has them.
    """
    return f"{name}: there is no such setting{closest_setting(name, known)}"


def closest_setting(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for a dotted name that is close as a whole or in its last part."""
    names = [other for other in known if other != name]  # another subcommand may have a setting of this name
    last = _last_part(name)
    if "." not in name:  # `--rank` stands for `--model.adapter.rank`
        same = [other for other in names if _last_part(other) == last]
        if len(same) == 1:
            return f"; did you mean {same[0]!r}?"

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        end = difflib.SequenceMatcher(None, last, _last_part(other)).ratio()
        if "." not in name:
            return max(whole, 0.97 * end)
        return max((whole + end) / 2, 0.85 * whole)

    best = max(names, key=likeness, default="")
    return f"; did you mean {best!r}?" if best and likeness(best) >= 0.7 else ""


def _last_part(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]


def _unrecognized(parser: argparse.ArgumentParser, arguments: str) -> str:
    flag = next((word for word in arguments.split() if word.startswith("-")), None)
    first = arguments.split()[0] if arguments.split() else arguments
    if flag is None or not first.startswith("-"):
        return f"{first!r}: unexpected argument; accepted: flags, which start with --"
    names = [name for action in parser._actions for name in action.option_strings]
    return unknown_setting(flag.partition("=")[0], names)


def _setting_names(parser: argparse.ArgumentParser) -> list[str]:
    """The dotted names of a parser's settings, and of its subcommands' settings."""
    names = []
    for action in parser._actions:
        choices = getattr(action, "choices", None)
        if isinstance(choices, dict):  # the parsers of subcommands
            names += [name for choice in choices.values() for name in _setting_names(choice)]
        names += [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
    return list(dict.fromkeys(names))


def _describe_tree(parser: argparse.ArgumentParser, text: str) -> str:
    """Describe jsonargparse's nested error by its path of keys and its innermost reason."""
    lines = text.splitlines()
    keys = [found[1] for line in lines if (found := _KEY.search(line))]
    given = without_internals(next((found[1] for line in lines if (found := _GIVEN.search(line))), ""))
    class_path = next((found[1] for line in reversed(lines) if (found := _CLASS.search(line))), None)
    if found := re.search(r'Unable to load config [\'"](.*?)[\'"]', text):
        return f"{keys[0]}: {found[1]!r} is no file; accepted: a file of settings, or the settings themselves"
    setting = _path(keys)
    rejected = next((found[1] for line in lines if (found := _REJECTED.search(line))), None)
    if rejected is not None:
        names = list(_parameters(class_path)) if class_path else []
        owner = f" of {class_path.rpartition('.')[2]}" if class_path else ""
        setting = setting.removesuffix(f".{rejected}")  # of an entry of a list, named twice
        return f"{setting}.{rejected}: there is no such setting{owner}{near_miss(rejected, names)}"
    wanted = next((found[1] for line in lines if (found := _IMPORT_PATH.search(line))), None)
    missing = next((line.strip(" -") for line in lines if _MISSING.match(line.strip(" -"))), None)
    bases = _bases(text)
    if wanted is None and missing is not None:
        wanted = class_path or given
    if wanted is not None and bases:
        known = sorted({one.__name__ for base in bases for one in _subclasses(base)})
        reason = f" ({missing.partition(';')[0]})" if missing else ""
        return (
            f"{setting}: {wanted!r} is no known class{reason}; accepted: "
            f"{', '.join(known)}, or the import path of your own{near_miss(wanted.rpartition('.')[2], known)}"
        )
    if wanted is not None:
        return f"{setting}: {wanted!r} is no class; accepted: an import path, such as package.Class"
    accepted = list(_accepted(lines))
    if bases:
        accepted.insert(0, "a class, as class_path with init_args")
    value = f"{given!r:.120}"
    if accepted:
        names = [name for one in accepted for name in one.split(", ")]
        whole = "" if _TYPES["int"] not in accepted else _whole_number(given)
        return f"{setting}: {value}; accepted: {', '.join(accepted)}{whole or near_miss(given, names)}"
    reason = " ".join(line.strip(" -") for line in lines[1:])
    return f"{setting}: {' '.join(reason.split())[:400]}" if reason else f"{setting}: {value} is not accepted"


def _whole_number(text: str) -> str:
    """Return a hint for ``1e3`` or ``8.0`` where an integer is accepted."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f"; did you mean {int(number)}?" if number.is_integer() and abs(number) < 1e15 else ""


def _path(keys: Sequence[str]) -> str:
    """The dotted name of the innermost of nested keys."""
    names = list(dict.fromkeys(keys))
    if names[0] == "data":
        names.insert(1, "init_args") if len(names) > 1 else None
    return ".".join(names)


def _accepted(lines: Sequence[str]) -> Iterator[str]:
    """What the innermost type accepts; a union lists its members below one another."""
    found = [
        (len(line) - len(line.lstrip(" -")), match[1]) for line in lines if (match := _EXPECTED.search(line))
    ]
    if not found:
        return
    deepest = max(indent for indent, _ in found)
    seen = dict.fromkeys(kind for indent, kind in found if indent == deepest)
    for kind in seen:
        if kind.startswith(("path but", "dot import path", "instantiatable class")):
            continue
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            yield ", ".join(part.strip().strip("'") for part in literal[1].split(","))
        elif name := re.fullmatch(r"<class '([\w.]+)'>", kind):
            short = name[1].rpartition(".")[2]
            if short != "Iterable":
                yield _TYPES.get(short, short)
        else:
            yield kind


def _bases(text: str) -> list[type]:
    """The classes whose subclasses a setting accepts."""
    found = re.search(r"Subtypes: \[(.*)\]", text)
    bases = []
    for path in re.findall(r"(?<![\w.])(?:gatera_lightning|lightning)\.[\w.]+", found[1] if found else ""):
        module, _, name = path.rpartition(".")
        base = getattr(importlib.import_module(module), name, None)
        if inspect.isclass(base) and base not in bases:
            bases.append(base)
    return bases


def _subclasses(base: type) -> set[type]:
    """All public subclasses that are imported, and those that this package imports on first use."""
    if base.__module__.startswith("gatera_lightning.datamodules"):
        package = importlib.import_module("gatera_lightning.datamodules")
        for name in package.__all__:
            getattr(package, name)
    found: set[type[Any]] = set()
    rest: list[type[Any]] = [base]
    while rest:
        children: list[type[Any]] = type.__subclasses__(rest.pop())
        rest += [child for child in children if child not in found]
        found.update(children)
    hidden = ("_", "Dummy")
    return {one for one in found if not one.__name__.startswith(hidden) and not inspect.isabstract(one)}


def _parameters(class_path: str) -> Iterator[str]:
    """The settings of a class, with those of the classes that it extends."""
    module, _, name = class_path.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return
    for one in inspect.getmro(cls):
        if one is not object and "__init__" in vars(one):
            yield from (
                name for name in inspect.signature(vars(one)["__init__"]).parameters if name != "self"
            )
