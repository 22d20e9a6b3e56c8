"""Text of a model in the terminal."""

import pytest

from gatera_lightning.cli.terminal_arguments import text_problem


@pytest.mark.parametrize(
    ("text", "problem"), [("Why?", None), (" ", "is empty"), ("a\udcff", "is not UTF-8")], ids=ascii
)
def test_text_problem_rejects_empty_and_undecodable_text(text, problem):
    assert text_problem(text) == problem
