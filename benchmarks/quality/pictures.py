"""Pictures of docs/results as SVG text, drawn from the ledger alone: the same lines give the same bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.families import FAMILIES
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import rate_curve
from benchmarks.quality.results import FamilyResults

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 210, 30, 55

COLORS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb",
    "#332288", "#44aa99", "#999933", "#cc6677", "#882255", "#117733", "#dd9900", "#aa4499", "#6699cc",
    "#661100", "#777777", "#225555", "#bb9955", "#994455", "#004488",
)  # fmt: skip
"""One for each method: Paul Tol's schemes bright and muted, for color-blind readers."""

MOST_LOSS_ABOVE_BEST = 0.5
"""Learning rates whose loss is further above the best are drawn at this distance, nats per token."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """An axis with its limits."""

    title: str

    low: float

    high: float

    ticks: Sequence[float]

    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return (at - low) / (high - low)


def linear_axis(title: str, values: Sequence[float]) -> Axis:
    """Return an axis around some values, with ticks at round numbers."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1
    low, high = low - margin, high + margin
    exponent = math.floor(math.log10((high - low) / 5))
    step = next(m * 10**exponent for m in (1, 2, 5, 10) if (high - low) / (m * 10**exponent) <= 8)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Axis(title, low, high, [number * step for number in range(first, last + 1)])


def rate_axis(rates: Sequence[float]) -> Axis:
    """Return a logarithmic axis with a tick at every rate."""
    return Axis("learning rate", min(rates) / 1.2, max(rates) * 1.2, sorted(set(rates)), logarithmic=True)


def draw(title: str, x: Axis, y: Axis, lines: Mapping[str, Points], *, mark_last: bool) -> str:
    """Draw one line with markers for each method.

    Args:
        title: Title of the picture.
        x: Horizontal axis.
        y: Vertical axis.
        lines: Points of each method, by name.
        mark_last: Whether only the last point of a line is marked large.
    """
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + across * x.place(point[0]), TOP + down * (1 - y.place(point[1]))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{title}</text>',
        f'<rect x="{LEFT}" y="{TOP}" width="{across}" height="{down}" fill="none" stroke="#444"/>',
        f'<text x="{LEFT + across / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{x.title}</text>',
        f'<text transform="translate(16 {TOP + down / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{y.title}</text>',
    ]
    for tick in x.ticks:
        left = LEFT + across * x.place(tick)
        parts.append(f'<path d="M{left:.1f} {TOP + down}v5" stroke="#444"/>')
        parts.append(f'<text x="{left:.1f}" y="{TOP + down + 18}" text-anchor="middle">{tick:.4g}</text>')
    for tick in y.ticks:
        top = TOP + down * (1 - y.place(tick))
        parts.append(f'<path d="M{LEFT} {top:.1f}h{across}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    colors = dict(zip(METHODS, COLORS, strict=True))
    for number, (name, points) in enumerate(lines.items()):
        color, placed = colors[name], [at(point) for point in points]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for position, (left, top) in enumerate(placed):
            radius = 5 if mark_last and position == len(placed) - 1 else 2.5
            parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}" fill="{color}"/>')
        top = TOP + 8 + 20 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{top}" r="5" fill="{color}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{top + 4}">{METHODS[name].title}</text>')
    return "\n".join([*parts, "</svg>", ""])


def learning_rates(lines: Sequence[Line], family: str) -> str | None:
    """Draw the loss on validation rows by learning rate; None without any."""
    curves = {}
    for name in METHODS:
        curve = rate_curve(lines, family, name)
        if points := [(rate, loss) for rate, loss in sorted(curve.items()) if math.isfinite(loss)]:
            curves[name] = points
    if not curves:
        return None
    rates = [rate for points in curves.values() for rate, _ in points]
    losses = [loss for points in curves.values() for _, loss in points]
    # Rates that fail would leave no room for the differences between those that work.
    ceiling = min(losses) + MOST_LOSS_ABOVE_BEST
    shown = {name: [(rate, min(loss, ceiling)) for rate, loss in points] for name, points in curves.items()}
    y = linear_axis("validation loss (nats per token)", [min(loss, ceiling) for loss in losses])
    title = f"{FAMILIES[family].title}: loss by learning rate, seed 0"
    if max(losses) > ceiling:
        title += f"; losses above {ceiling:.2f} are drawn there"
    return draw(title, rate_axis(rates), y, shown, mark_last=False)


def retention(lines: Sequence[Line], family: str) -> str | None:
    """Draw held-out loss and forgetting during training, mean over seeds; None without runs."""
    results = FamilyResults(family, lines)
    curves = {
        name: [(point.heldout, point.forgotten) for point in results.trajectory(name)]
        for name in METHODS
        if name in results.level_runs
    }
    if not curves:
        return None
    points = [point for curve in curves.values() for point in curve]
    x = linear_axis("held-out loss (nats per token)", [heldout for heldout, _ in points])
    y = linear_axis("forgetting, nats per token", [forgotten for _, forgotten in points])
    title = f"{FAMILIES[family].title}: learning against forgetting; the large point is the end"
    return draw(title, x, y, curves, mark_last=True)


PICTURES: dict[str, Callable[[Sequence[Line], str], str | None]] = {
    "learning_rates": learning_rates,
    "retention": retention,
}


def pictures(lines: Sequence[Line]) -> dict[str, str]:
    """Return every picture that has data, by the name of its file."""
    drawn = {
        f"comparison_{name}_{family}.svg": picture(lines, family)
        for family in FAMILIES
        for name, picture in PICTURES.items()
    }
    return {name: text for name, text in drawn.items() if text is not None}
