"""Text of a model in the terminal."""

import pytest

from gatera_lightning.cli.terminal_arguments import text_problem
from gatera_lightning.cli.terminal_model import printable


def test_printable_escapes_what_would_control_the_terminal():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[31m\r\x07\x7f\x9b\u202e é🐝") == r"\u001b[31m\u000d\u0007\u007f\u009b\u202e é🐝"


@pytest.mark.parametrize(
    ("text", "problem"), [("Why?", None), (" ", "is empty"), ("a\udcff", "is not UTF-8")], ids=ascii
)
def test_text_problem_rejects_empty_and_undecodable_text(text, problem):
    assert text_problem(text) == problem
