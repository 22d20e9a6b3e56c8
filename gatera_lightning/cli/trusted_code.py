"""Which code a command line may run: only the user's own flags give trust, never a file.

A config may come from somebody else. Code that comes with weights runs only if a flag says so. `preview`,
`estimate` and `submit` only look at a config, so classes of other packages have to be named by a flag, too;
`fit`, `validate`, `test` and `predict` run every class that a config names.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml
from jsonargparse import Namespace

from gatera_lightning.compatibility.jsonargparse_internals import importing_only
from gatera_lightning.errors import ConfigError

REMOTE_CODE = "model.backbone.trust_remote_code"

_OWN_PACKAGES = ("gatera_lightning", "lightning")
_CLASS_FLAGS = re.compile(
    r"data|(.*\.)?class_path|model\.objectives|model\.adapter\.gate(\.kind)?"
    r"|trainer\.(logger|callbacks|strategy|plugins|profiler|accelerator)"
)
"""Flags whose value may name a class. Any other value, such as a file's name, names none."""

_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


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
    values = [value for name, value in _flags(args) if _CLASS_FLAGS.fullmatch(name.removesuffix("+"))]
    named = {path for value in values for path in _DOTTED_NAME.findall(value)}
    with importing_only(lambda path: path in named or path.partition(".")[0] in _OWN_PACKAGES) as refused:
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


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every flag of a command line with its value."""
    rest = iter(args)
    for arg in rest:
        if arg.startswith("-"):
            name, equals, value = arg.lstrip("-").partition("=")
            yield ("config" if arg == "-c" else name), value if equals else next(rest, "")


def _yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
