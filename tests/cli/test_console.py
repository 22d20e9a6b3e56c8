"""The log on standard error."""

import io
import logging
import sys

import pytest

from gatera_lightning.cli import console
from gatera_lightning.cli.console import set_up_console


@pytest.mark.parametrize(("rank", "shown"), [(0, ["info", "warning"]), (1, ["warning"])])
def test_console_shows_information_on_rank_zero_only(monkeypatch, rank, shown):
    package_log = logging.getLogger("gatera_lightning")
    for name, value in (("handlers", []), ("propagate", False), ("level", package_log.level)):
        monkeypatch.setattr(package_log, name, value)  # as in a process that has not configured logging
    monkeypatch.setattr(console, "global_rank", lambda: rank)
    set_up_console()
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())  # a live progress bar replaces it as well
    package_log.info("Seed set to 0")  # Lightning's, without a meaning for the run
    package_log.info("info")
    package_log.warning("warning")
    assert stream.getvalue().splitlines() == shown
    package_log.warning("file \x1b[2J.json")
    assert stream.getvalue().endswith("file \\u001b[2J.json\n")


def test_console_leaves_configured_log_alone():
    log = logging.getLogger("gatera_lightning")
    handlers, level = list(log.handlers), log.level
    set_up_console()  # pytest has configured the root logger
    assert (log.handlers, log.level) == (handlers, level)
