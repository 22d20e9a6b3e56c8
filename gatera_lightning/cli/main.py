"""`python -m gatera_lightning`: runs one subcommand and returns an exit code."""

import sys
from collections.abc import Callable, Sequence

from gatera_lightning.cli.commands import load_subcommand
from gatera_lightning.cli.console import set_up_console
from gatera_lightning.cli.exit_codes import ExitCode, report_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The subcommand and its flags; default: those of this process.

    Returns:
        The exit code, one of :class:`ExitCode`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    run = _subcommand(args)
    set_up_console()
    try:
        run()
    except Exception as error:
        code = report_error(error)
        if code is None:
            raise
        return code
    return ExitCode.SUCCESS


def _subcommand(args: list[str]) -> Callable[[], object]:
    """What to run; only its own module is imported."""
    if args and (subcommand := load_subcommand(args[0])):
        return lambda: subcommand(args[1:])
    from gatera_lightning.cli import lightning_cli

    return lambda: lightning_cli.GateRACLI(args)


if __name__ == "__main__":
    sys.exit(main())
