"""What is printed on a terminal holds no control characters but the console's own."""

import io

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from gatera_lightning.terminal.printing import SafeConsole, print_text

HOSTILE = "a\x1b[31mb\x9b2Jc\u202ed\re\x07f\ud800"
ESCAPED = "a\\u001b[31mb\\u009b2Jc\\u202ed\\u000de\\u0007f\\ud800"


def table():
    found = Table("column", title=Text(HOSTILE))
    found.add_row(Text(HOSTILE))
    return found


@pytest.mark.parametrize("printed", [HOSTILE, Text(HOSTILE, "red"), table()], ids=["str", "Text", "Table"])
def test_console_escapes_what_it_prints(printed):
    stream = io.StringIO()
    SafeConsole(file=stream, soft_wrap=True, width=200, highlight=False).print(printed)
    text = stream.getvalue()
    assert "\\u001b[31m" in text
    assert "\\u202e" in text
    assert not set(text) & set("\x1b\x9b\u202e\r\x07\ud800")


def test_console_keeps_its_own_colors_and_bars():
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, color_system="standard", width=80)
    console.print(Text("x\x1b", "red"))
    assert stream.getvalue() == "\x1b[31mx\\u001b\x1b[0m\n"
    with Progress(console=console) as progress:
        progress.add_task("a\x1bb", total=1)
    assert "a\x1bb" not in stream.getvalue()
    assert "\x1b[?25l" in stream.getvalue()  # hides the cursor


def test_print_text(capsys):
    print_text(HOSTILE, end="!")
    assert capsys.readouterr().out == ESCAPED + "!"


def test_broken_pipe_is_left_to_the_caller():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        SafeConsole(file=Closed()).print("x")
