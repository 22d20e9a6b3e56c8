"""The committed page and pictures are those that the committed ledger draws."""

import re

import pytest

from benchmarks.quality import ledger, page
from benchmarks.quality.pictures import pictures
from benchmarks.quality.results import TrajectoryPoint, forgotten_at


def test_page_and_pictures_equal_ledger():
    files = page.files(ledger.read())
    for path, text in files.items():
        assert path.read_text() == text, "run: python -m benchmarks.quality --tables"
    drawn = {path.name for path in files if path.suffix == ".svg"}
    assert {path.name for path in page.IMAGES.glob("comparison_*.svg")} == drawn


def test_redraw_changes_blocks_only_and_needs_all_of_them():
    text = page.PAGE.read_text()
    spoiled = re.sub(
        r"(<!-- ledger: runs -->).*?(<!-- end -->)", r"\1 old \2", text, count=1, flags=re.DOTALL
    )
    spoiled = spoiled.replace("<!-- ledger: runs --> old ", "<!-- ledger: runs -->\nold\n")
    drawn = page.blocks(ledger.read(), pictures(ledger.read()))
    assert page.redraw(page.PAGE, spoiled, drawn) == text
    with pytest.raises(
        ValueError, match=r"missing blocks \['math'\]; unknown or repeated blocks \['algebra'\]"
    ):
        page.redraw(page.PAGE, text.replace("ledger: math", "ledger: algebra"), drawn)


def test_forgetting_is_interpolated_where_the_loss_is_first_reached():
    points = [(4.0, 0.0), (3.0, 0.4), (3.5, 0.8), (2.0, 1.2)]
    trajectory = [TrajectoryPoint(step, *point) for step, point in enumerate(points)]
    assert forgotten_at(trajectory, 3.5) == pytest.approx(0.2)
    assert forgotten_at(trajectory, 2.5) == pytest.approx(0.8 + 0.4 * 2 / 3)
    assert forgotten_at(trajectory, 1.0) is None
