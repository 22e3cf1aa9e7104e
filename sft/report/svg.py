"""Charts as SVG that takes its colours from the page, in light and dark."""

from __future__ import annotations

from html import escape
from itertools import pairwise

from sft.report.charts import Chart, Point, Series, thinned, ticks

WIDTH, HEIGHT = 380, 210  # of the view box: text has its own size on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28
MOST_MARKS = 40  # points of a series that are drawn one by one


def svg(chart: Chart) -> str:
    """Return a chart as an SVG element; values show under the pointer.

    Args:
        chart: its series have points.
    """
    frame = _Frame(chart)
    drawn = [_bars(frame, s) if chart.bars else _curve(frame, s, i)
             for i, s in enumerate(frame.series)]  # fmt: skip
    words = escape(chart.describe())
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}: '
        f'{words}">{_grid(frame)}{"".join(drawn)}</svg>'
    )


class _Frame:
    """Where values lie in the view box."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.series = [Series(s.name, thinned(s.points)) for s in chart.series]
        steps = [x for s in self.series for x, _ in s.points]
        values = [y for s in self.series for _, y in s.points]
        self.steps = (min(steps), max(steps))
        self.ticks = ticks(0.0 if chart.from_zero else min(values), max(values))

    def x(self, step: float) -> float:
        first, last = self.steps
        share = (step - first) / (last - first) if last > first else 0.5
        edge = 10 if self.chart.bars else 0  # half a bar
        return LEFT + edge + share * (WIDTH - LEFT - RIGHT - 2 * edge)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _grid(frame: _Frame) -> str:
    """Return lines and numbers of both axes."""
    parts = []
    for tick in frame.ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        text = escape(frame.chart.show(tick))
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}">{text}</text>')
    for step, anchor in _step_ticks(frame):
        at = f'x="{frame.x(step):.1f}" y="{HEIGHT - 10}"'
        parts.append(f'<text class="tick {anchor}" {at}>{step:g}</text>')
    return "".join(parts)


def _step_ticks(frame: _Frame) -> list[tuple[float, str]]:
    """Return steps to name: the first, the last, and round ones that keep their distance."""
    first, last = frame.steps
    if first == last:
        return [(first, "middle")]
    room = (last - first) / 6
    round_ones = [t for t in ticks(first, last) if first + room < t < last - room]
    inner = [(t, "middle") for t in round_ones if t == int(t)]
    ends = ("middle", "middle") if frame.chart.bars else ("start", "end")
    return [(first, ends[0]), *inner, (last, ends[1])]


def _curve(frame: _Frame, series: Series, number: int) -> str:
    """Return a line, its end marked, with values to point at."""
    at = [(frame.x(step), frame.y(value)) for step, value in series.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    marked = at if len(at) <= MOST_MARKS else at[-1:]
    dots = [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in marked]
    pairs = zip(series.points, at, strict=True)
    hints = [_hint(frame, series, point, place) for point, place in pairs]
    inner = f'<path class="curve" d="{path}"/>{"".join(dots)}{"".join(hints)}'
    return f'<g class="s{number}">{inner}</g>'


def _bars(frame: _Frame, series: Series) -> str:
    """Return a bar for each event."""
    places = [frame.x(step) for step, _ in series.points]
    gaps = [b - a for a, b in pairwise(places)]
    width = max(1.5, min([18.0, *(0.7 * gap for gap in gaps)]))
    floor = frame.y(frame.ticks[0])
    bars = [
        f'<rect class="bar" x="{x - width / 2:.1f}" y="{frame.y(point[1]):.1f}" '
        f'width="{width:.1f}" height="{max(floor - frame.y(point[1]), 0.5):.1f}" rx="1.5">'
        f"<title>{_say(frame, series, point)}</title></rect>"
        for x, point in zip(places, series.points, strict=True)
    ]
    return f'<g class="s0">{"".join(bars)}</g>'


def _hint(frame: _Frame, series: Series, point: Point, place: tuple[float, float]) -> str:
    """Return an invisible disc that tells its value under the pointer."""
    x, y = place
    return (
        f'<circle class="hint" cx="{x:.1f}" cy="{y:.1f}" r="7">'
        f"<title>{_say(frame, series, point)}</title></circle>"
    )


def _say(frame: _Frame, series: Series, point: Point) -> str:
    return escape(f"step {point[0]:g}: {series.name} {frame.chart.show(point[1])}")
