"""Signals that would end the process silently raise an exception in the main thread."""

import os
import signal
import threading

import pytest

from gatera_lightning.cli.main import main
from gatera_lightning.cli.signals import EndingSignals
from gatera_lightning.errors import Interrupted

ENDING = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def handlers():
    return {number: signal.getsignal(number) for number in (*ENDING, signal.SIGINT)}


@pytest.mark.parametrize("number", ENDING)
def test_signal_raises_interrupted_and_handlers_return(number):
    before, signals = handlers(), EndingSignals()
    with pytest.raises(Interrupted) as caught, signals.raised():
        signal.raise_signal(number)
    assert (caught.value.number, signals.received) == (number, number)
    assert handlers() == before


def test_control_c_stays_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt), EndingSignals().raised():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "handled"])
def test_signal_that_the_caller_ignores_or_handles_is_left_alone(handler):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with EndingSignals().raised():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_forked_worker_dies_of_the_signal_itself():
    with EndingSignals().raised():
        worker = os.fork()
        if worker == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(7)  # the handler raised an exception
        _, status = os.waitpid(worker, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_other_threads_do_without_signals():
    before, found = handlers(), []

    def run():
        with EndingSignals().raised():
            found.append(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_small_command_ends_with_one_line(monkeypatch, capsys, number, code):
    from gatera_lightning.cli.commands import compare

    monkeypatch.setattr(compare, "read_run", lambda path: signal.raise_signal(number))
    assert main(["compare", "a", "b"]) == code
    assert capsys.readouterr().err == (
        f"python -m gatera_lightning: ended by {number.name} during compare; its work is not complete\n"
    )


def test_second_signal_does_not_disturb_the_report(monkeypatch, capsys):
    """SLURM and torchrun send SIGTERM to a rank that is about to say why it ended."""
    from gatera_lightning.cli import error_report
    from gatera_lightning.cli.commands import compare

    before, translate = handlers(), error_report.translate

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return translate(*args)

    monkeypatch.setattr(error_report, "translate", interrupted)
    monkeypatch.setattr(compare, "read_run", lambda path: 1 / 0)
    assert main(["compare", "a", "b"]) == 1
    assert "division by zero" in capsys.readouterr().err
    assert handlers() == before
