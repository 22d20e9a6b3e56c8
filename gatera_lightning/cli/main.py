"""`python -m gatera_lightning`: runs one subcommand and returns an exit code."""

import sys
from collections.abc import Callable, Sequence

from gatera_lightning.cli.commands import ALIASES, LIGHTNING_SUBCOMMANDS, SUMMARIES, load_subcommand
from gatera_lightning.cli.console import set_up_console
from gatera_lightning.cli.environment import check_environment, set_up_process
from gatera_lightning.cli.error_report import flush_output, report, take_traceback_flag
from gatera_lightning.cli.error_translation import ParseError
from gatera_lightning.cli.exit_codes import ExitCode
from gatera_lightning.cli.signals import EndingSignals
from gatera_lightning.errors import unknown_value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The subcommand and its flags; default: those of this process.

    Returns:
        The exit code, one of :class:`ExitCode`, or 128 plus the number of the signal that ended the program.

    Raises:
        SystemExit: By `--help` and `--print_config`.
    """
    args, show_traceback = take_traceback_flag(sys.argv[1:] if argv is None else argv)
    command = args[0] if args and not args[0].startswith("-") else ""
    signals = EndingSignals()
    with signals.raised():
        try:
            if argv is None:  # this process is ours
                set_up_process(show_traceback=show_traceback)
            check_environment()
            run = _subcommand(args)
            signals.raise_swallowed()
            set_up_console()
            try:
                run()
            finally:
                flush_output()
        except BaseException as error:
            signals.ignore()  # one that arrives during the report would replace it by a traceback
            code = report(error, command, signals.received, show_traceback=show_traceback)
            if code is None:
                raise
            return code
    return ExitCode.SUCCESS


def _subcommand(args: list[str]) -> Callable[[], object]:
    """What to run; only its own module is imported."""
    if args == ["--version"]:
        from gatera_lightning import __version__

        return lambda: print(f"gatera_lightning {__version__}")
    if not args or not args[0].startswith("-"):
        names = [*LIGHTNING_SUBCOMMANDS, *SUMMARIES, *ALIASES]
        if not args or args[0] not in names:
            raise ParseError(unknown_value("COMMAND", args[0] if args else None, names))
    if args and (subcommand := load_subcommand(args[0])):
        return lambda: subcommand(args[1:])
    from gatera_lightning.cli import lightning_cli

    return lambda: lightning_cli.GateRACLI(args)


if __name__ == "__main__":
    sys.exit(main())
