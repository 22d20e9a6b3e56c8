"""Signals end every subcommand in the same way, from its first import to its last line."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gatera_lightning.errors import Interrupted

_ENDING_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)


class EndingSignals:
    """Raises an exception in the main thread when a signal arrives that would end the process silently.

    Ctrl-C raises KeyboardInterrupt, as everywhere in Python; any other signal raises Interrupted. A signal
    that the caller ignores (as `nohup` does) or handles keeps its handler.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The last signal; set even if a library has replaced the exception by one of its own."""
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise exceptions for signals inside this context."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python handles signals in the main thread only
            return
        for number in _ENDING_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self._raise)
        try:
            yield
        finally:
            while self._previous:
                signal.signal(*self._previous.popitem())

    def raise_swallowed(self) -> None:
        """Raise again for a signal whose exception a library has caught, as some do around their imports.

        Its modules may then be incomplete, so nothing may use them.
        """
        if self.received is not None:
            self._raise_for(self.received)

    def ignore(self) -> None:
        """Let further signals do nothing until the context ends: SLURM and torchrun send several."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker would print a traceback
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        self._raise_for(number)

    @staticmethod
    def _raise_for(number: int) -> NoReturn:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(number)
