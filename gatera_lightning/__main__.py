"""`python -m gatera_lightning`."""

import signal
import sys

from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.signals import EndingSignals
from gatera_lightning.errors import Interrupted


def run() -> int:
    """Import the command line and run it; a signal during the import ends the program as any later one."""
    signals = EndingSignals()
    try:
        with signals.raised():
            from gatera_lightning.cli.main import main

            signals.raise_swallowed()
    except BaseException:
        if signals.received is None:
            raise
        print(f"{PROGRAM}: {Interrupted(signals.received)}", file=sys.stderr)
        return 128 + signals.received
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would print a traceback while it shuts down


if __name__ == "__main__":
    sys.exit(run())
