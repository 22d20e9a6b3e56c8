"""Standard input and output of `chat` and `generate`."""

import contextlib
import io
import sys
from collections.abc import Iterator


def accept_any_bytes() -> None:
    """Read bytes that are not UTF-8 as surrogates, so that they are reported instead of raising an error."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def input_lines(help_line: str) -> Iterator[str]:
    """Yield the lines that a user types, with line editing, or those of a file or pipe.

    Args:
        help_line: Printed to standard error on Ctrl-C.
    """
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and history
    while True:
        try:
            yield _typed_line().strip()
        except KeyboardInterrupt:
            print(f"\n{help_line}", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _typed_line() -> str:
    """A typed line; its prompt goes to standard error if the answers go to a file or pipe."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()
