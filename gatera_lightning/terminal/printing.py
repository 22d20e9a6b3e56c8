"""Printing to a terminal text that others have written: rows, names of files and columns, model output."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from gatera_lightning.errors import printable


def print_text(text: str, *, end: str = "\n") -> None:
    """Print to standard output at once, without characters that would control a terminal."""
    print(printable(text), end=end, flush=True)


class SafeConsole(Console):
    """A rich console that escapes control characters in what it prints; colors and bars are its own."""

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object to segments of printable text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    @override
    def on_broken_pipe(self) -> None:
        """Leave the end of the program to its caller; rich would exit with 1."""
        raise  # the BrokenPipeError that is being handled
