"""`python -m gatera_lightning`."""

import signal
import sys

from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.signals import EndingSignals
from gatera_lightning.errors import Interrupted


def run() -> int:
    """Import the command line and run it; a signal during the import ends the program as any later one."""
    try:
        with EndingSignals().raised():
            from gatera_lightning.cli.main import main
    except (KeyboardInterrupt, Interrupted) as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        print(f"{PROGRAM}: {Interrupted(number)}", file=sys.stderr)
        return 128 + number
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would print a traceback while it shuts down


if __name__ == "__main__":
    sys.exit(run())
