"""The wording that messages share."""

import pytest

from gatera_lightning.errors import printable, unknown_value


def test_printable_escapes_what_would_control_the_terminal():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[31m\r\x07\x7f\x9b\u202e é🐝") == r"\u001b[31m\u000d\u0007\u007f\u009b\u202e é🐝"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hirra", "update: 'hirra' is unknown; accepted: lora, hira; did you mean 'hira'?"),
        ("x", "update: 'x' is unknown; accepted: lora, hira"),
        (3, "update: 3 is unknown; accepted: lora, hira"),
        (None, "update: is not set; accepted: lora, hira"),
    ],
)
def test_unknown_value_names_accepted_and_closest_names(value, message):
    assert unknown_value("update", value, ["lora", "hira"]) == message
