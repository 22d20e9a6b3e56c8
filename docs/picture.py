"""Draw a terminal log, with its colors, as docs/images/demo.svg: run by ``make pictures``."""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

console = Console(record=True, width=104, file=sys.stderr, force_terminal=True)
console.print(Text.from_ansi(sys.stdin.read()))
console.save_svg(str(Path(__file__).parent / "images" / "demo.svg"), title="make demo")
