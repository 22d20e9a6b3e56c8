"""The parser of this package's own subcommands."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.error_report import TRACEBACK_FLAG, TRACEBACK_VARIABLE
from gatera_lightning.cli.error_translation import ParseError
from gatera_lightning.cli.parse_errors import describe
from gatera_lightning.errors import near_miss

_FIT_FLAGS = (
    *("--config", "--print_config", "--seed_everything", "--ckpt_path", "--weights_only"),
    *("--trainer", "--model", "--data"),
)


class SubcommandParser(argparse.ArgumentParser):
    """Parses the flags of one subcommand; abbreviations are refused, and errors are one sentence.

    Args:
        name: The subcommand.
        settings: Further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(prog=f"{PROGRAM} {name}", allow_abbrev=False, **settings)
        self.register("type", Path, _path)  # for every argument with `type=Path`
        self.add_argument(
            TRACEBACK_FLAG,
            action="store_true",  # read before any parser sees the command line
            help=f"show the traceback of an error; also {TRACEBACK_VARIABLE}=1",
        )

    def parse_before_fit(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse the flags of this subcommand and return the rest, which are those of `fit`.

        A flag that is close to one of this subcommand is not left to `fit`, which could not name it.

        Raises:
            ParseError: The flags cannot be parsed.
        """
        known, others = self.parse_known_args(argv)
        own = [name for action in self._actions for name in action.option_strings]
        from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS  # `compare` does without Lightning

        of_fit = {*_FIT_FLAGS, *(f"--{section}" for section in RUN_CALLBACKS)}
        for arg in others:
            name = arg.partition("=")[0].removesuffix("+")
            is_unknown = name.startswith("--") and "." not in name and name not in of_fit
            if is_unknown and (hint := near_miss(name, own)):
                raise ParseError(f"{name}: there is no such setting{hint}")
        return known, others

    @override
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the flags; one that does not exist is named before those that are missing.

        Raises:
            ParseError: The flags cannot be parsed.
        """
        known = {name for action in self._actions for name in action.option_strings}
        for arg in args or ():
            name = arg.partition("=")[0]
            if arg == "--":
                break
            if name.startswith("--") and name not in known:
                self.error(f"unrecognized arguments: {name}")
        return super().parse_args(args, namespace)

    @override
    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse would ignore a full disk or a closed pipe."""
        print(self.format_help(), end="", file=file, flush=True)

    @override
    def error(self, message: str) -> NoReturn:
        """Raise the error as one sentence.

        Raises:
            ParseError: Always.
        """
        raise ParseError(describe(self, message))


def _path(text: str) -> Path:
    """Refuse an empty path, such as an unset variable of the shell: it would be the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a path, and . for the working folder")
    return Path(text)
