"""Which code a command line may run: only the user's own flags give trust, never a file.

A config may come from somebody else. Code that comes with weights runs only if a flag says so. `preview`,
`estimate` and `submit` only look at a config, so classes of other packages have to be named by a flag, too;
`fit`, `validate`, `test` and `predict` run every class that a config names.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import yaml
from jsonargparse import Namespace

from gatera_lightning.compatibility.jsonargparse_internals import importing_only
from gatera_lightning.errors import ConfigError

REMOTE_CODE = "model.backbone.trust_remote_code"

_OWN_PACKAGES = ("gatera_lightning", "lightning")
_CLASS_FLAGS = {
    *("data", "model.adapter.gate", "model.objectives"),
    *(
        f"trainer.{name}"
        for name in ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")
    ),
}
"""Flags whose value may be the import path of a class, or a list of them."""


def trust_problems(settings: Namespace, args: Sequence[str]) -> list[str]:
    """Refuse trust that a config gives.

    Args:
        settings: The parsed settings of a subcommand.
        args: The command line that they come from.

    Returns:
        Messages that name the setting, its value and what is accepted.
    """
    problems = []
    if settings.get(REMOTE_CODE) is True and not flags_trust_remote_code(args):
        problems.append(
            f"{REMOTE_CODE}: true in a config would run code that comes with the weights; accepted: false, "
            f"or the flag --{REMOTE_CODE} true on your own command line"
        )
    if settings.get("weights_only") is False:
        problems.append(
            "weights_only: false would run code in the checkpoint; accepted: null or true, which read every "
            "checkpoint of this program"
        )
    return problems


def flags_trust_remote_code(args: Sequence[str]) -> bool:
    """Return whether a command line turns remote code on with the flag of exactly this setting."""
    return any(name == REMOTE_CODE and _yaml(value) is True for name, value in _flags(args))


@contextmanager
def own_classes_only(args: Sequence[str]) -> Iterator[None]:
    """Parse with the classes of this project and of Lightning, and those that the user's flags name.

    Args:
        args: The command line that is parsed.

    Raises:
        ConfigError: A config names another class; nothing of its package is imported.
    """
    named = {path for name, value in _flags(args) if name != "config" for path in _classes(name, value)}

    def is_allowed(path: str) -> bool:
        return path.partition(".")[0] in _OWN_PACKAGES or path in named or path in _definitions(named)

    with importing_only(is_allowed) as refused:
        try:
            yield
        except (Exception, SystemExit) as error:
            if refused:
                raise ConfigError(
                    f"class_path: {refused[0]!r} in a config is code of another package, which preview, "
                    "estimate and submit do not run; accepted: a class of gatera_lightning or lightning, or "
                    f"the class in a flag of your own, such as --data {refused[0]}; fit runs it"
                ) from error
            raise


def _classes(name: str, value: str) -> Iterator[str]:
    """The import paths of classes in the value of a flag."""
    content = _yaml(value)
    yield from _class_paths(content)
    if name.endswith(".class_path") or name in _CLASS_FLAGS:
        entries = content if isinstance(content, list) else [content]
        yield from (entry for entry in entries if isinstance(entry, str))


def _class_paths(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(path := content.get("class_path"), str):
            yield path
        content = list(content.values())
    if isinstance(content, list):
        for entry in content:
            yield from _class_paths(entry)


def _definitions(named: Iterable[str]) -> Iterator[str]:
    """Where the classes of import paths are defined, if they are imported: a package may re-export them."""
    for path in named:
        module, _, name = path.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type):
            yield f"{found.__module__}.{found.__qualname__}"


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every flag of a command line with its value; another flag is no value."""
    rest = deque(args)
    while rest:
        arg = rest.popleft()
        if arg.startswith("-"):
            name, equals, value = arg.lstrip("-").partition("=")
            if not equals:
                value = rest.popleft() if rest and not rest[0].startswith("--") and rest[0] != "-c" else ""
            yield ("config" if arg == "-c" else name.removesuffix("+")), value


def _yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
