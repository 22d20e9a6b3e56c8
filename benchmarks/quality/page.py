"""What is drawn from the ledger: blocks between markers of a page and of README, and pictures."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.quality.costs import Timings, cost_table
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.ledger import Line
from benchmarks.quality.overview import overview, summary
from benchmarks.quality.pictures import pictures
from benchmarks.quality.tables import families, family_section, runs

DOCS = Path(__file__).parents[2] / "docs"

PAGE = DOCS / "results" / "comparison.md"

README = DOCS.parent / "README.md"

IMAGES = DOCS / "images"

_BLOCK = re.compile(r"(<!-- ledger: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""``<!-- ledger: NAME -->``, what is drawn, and ``<!-- end -->``."""


def blocks(lines: Sequence[Line], images: Collection[str]) -> dict[str, str]:
    """Return what each block of the page holds: runs, answers, rows, costs, and what each family shows."""
    drawn = {
        "runs": runs(lines),
        "overview": overview(lines),
        "families": families(),
        "costs": cost_table(lines, Timings.read()),
    }
    for family in FAMILIES:
        shown = [f"![{name}](../images/{name})" for name in images if name.endswith(f"_{family}.svg")]
        drawn[family] = "\n\n".join([*shown, family_section(lines, family)])
    return drawn


def redraw(path: Path, text: str, drawn: Mapping[str, str]) -> str:
    """Return the text of a file with every block drawn.

    Args:
        path: The file, for messages.
        text: Its text.
        drawn: What each of its blocks holds, by name.

    Raises:
        ValueError: If it lacks a block, or has one that is not in ``drawn``.
    """
    found = [name for _, name, _ in _BLOCK.findall(text)]
    if sorted(found) != sorted(drawn):
        missing, unknown = sorted(set(drawn) - set(found)), sorted(set(found) - set(drawn))
        raise ValueError(f"{path.name}: missing blocks {missing}; unknown or repeated blocks {unknown}")
    return _BLOCK.sub(lambda block: f"{block[1]}\n{drawn[block[2]]}\n\n{block[3]}", text)


def files(lines: Sequence[Line]) -> Mapping[Path, str]:
    """Return the page and its pictures as the ledger says they are."""
    images = pictures(lines)
    drawn = {PAGE: blocks(lines, images), README: {"summary": summary(lines)}}
    texts = {path: redraw(path, path.read_text(), parts) for path, parts in drawn.items()}
    return texts | {IMAGES / name: text for name, text in images.items()}


def write(lines: Sequence[Line]) -> list[Path]:
    """Write the page and its pictures, and return those that changed."""
    changed = []
    for path, text in files(lines).items():
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    return changed
