"""What a report draws, free of how: charts of series, and maps of layers by type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from sft.report.numbers import figure

Point = tuple[float, float]
MOST_POINTS = 240  # of a series: more are one line of ink, and a page of megabytes


@dataclass(frozen=True)
class Series:
    """Points by ascending step."""

    name: str
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """One or more series over the steps of a run.

    Args:
        key: names the file of a plot.
        title: what is measured.
        series: in the order of their colours.
        bars: events, not a curve.
        from_zero: the axis begins at 0, as of amounts.
        show: turns a value into text.
        note: one line under the title.
    """

    key: str
    title: str
    series: list[Series]
    bars: bool = False
    from_zero: bool = False
    show: Callable[[float], str] = field(default=figure)
    note: str = ""

    def describe(self) -> str:
        """Return the chart in words."""
        return "; ".join(
            f"{s.name} goes from {self.show(s.points[0][1])} at step {s.points[0][0]:g} "
            f"to {self.show(s.points[-1][1])} at step {s.points[-1][0]:g}"
            for s in self.series
        )

    def table(self, most: int = 60) -> list[list[str]]:
        """Return rows of step and values, thinned where they are many."""
        columns = [dict(thinned(s.points, most)) for s in self.series]
        steps = sorted({step for column in columns for step in column})
        return [
            [f"{step:g}", *(self.show(c[step]) if step in c else "" for c in columns)]
            for step in steps
        ]


@dataclass(frozen=True)
class Map:
    """A value for each layer and type of module.

    Args:
        key: names the file of a plot.
        title: what is measured.
        rows: types of modules.
        columns: layers.
        values: by row and column; None where there is no such module.
        show: turns a value into text.
        note: one line under the title.
    """

    key: str
    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    show: Callable[[float], str] = field(default=figure)
    note: str = ""

    def known(self) -> list[float]:
        """Return all values that there are."""
        return [value for row in self.values for value in row if value is not None]

    @property
    def low(self) -> float:
        """What the lightest shade stands for: 0, unless all values lie far from it."""
        least = min(self.known())
        return min(least, 0.0) if least < self.high / 2 else least

    @property
    def high(self) -> float:
        """What the darkest shade stands for."""
        return max(self.known())

    def shade(self, value: float) -> float:
        """Return where a value lies between lightest, 0, and darkest, 1."""
        low, high = self.low, self.high
        return (value - low) / (high - low) if high > low else 0.5

    def names(self, column: int) -> bool:
        """Whether there is room to name a column: each, or every fifth."""
        return len(self.columns) <= 16 or column % 5 == 0

    @property
    def is_even(self) -> bool:
        """Whether all values read alike."""
        return len({self.show(value) for value in self.known()}) == 1


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most so many points: the first, the last, and means of those between."""
    if len(points) <= most:
        return points
    inner, wanted = points[1:-1], most - 2
    edges = [round(i * len(inner) / wanted) for i in range(wanted + 1)]
    groups = [inner[a:b] for a, b in pairwise(edges)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers, about so many, from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
