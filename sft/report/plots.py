"""The charts and maps of a run as PNG files, by matplotlib."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

from sft.report.charts import Chart, Map, thinned
from sft.report.curves import curves
from sft.report.folder import RunFolder
from sft.report.maps import maps
from sft.run.folder import PLOTS
from sft.whole import written_whole

COLORS = ("#2458c6", "#b4540a", "#0f766e", "#7c3aed")
STYLES = ("-", "--", "-.", ":")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(run: RunFolder) -> list[str]:
    """Draw what a run has figures for into its folder `plots`, which is replaced.

    Returns:
        names of the files; without any, nothing is written.
    """
    groups = curves(run.lines, run.section("before"))
    drawn: list[Chart | Map] = [chart for group in groups for chart in group]
    drawn += maps(run)
    if not drawn:
        return []
    with written_whole(run.path / PLOTS) as folder:
        return [plot(one, folder / f"{one.key}.png") for one in drawn]


def plot(one: Chart | Map, path: Path) -> str:
    """Draw a chart or a map into a file; return its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4) if isinstance(one, Chart) else map_inches(one))
    axes = figure.subplots()
    if isinstance(one, Chart):
        draw_chart(axes, one)
    else:
        draw_map(axes, one)
    figure.savefig(path, dpi=144, bbox_inches="tight", metadata={"Software": None})
    return path.name


def draw_chart(axes: Any, chart: Chart) -> None:
    """Draw a chart on matplotlib's axes."""
    looks = zip(chart.series, COLORS, STYLES, strict=False)
    for series, color, style in looks:
        steps, values = zip(*thinned(series.points), strict=True)
        if chart.bars:
            gaps = [b - a for a, b in pairwise(steps)]
            axes.bar(steps, values, width=0.7 * min(gaps, default=1), color=color)
        else:
            mark = "o" if len(steps) <= 40 else None
            axes.plot(steps, values, style, color=color, marker=mark, ms=3, label=series.name)
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: chart.show(value))
    axes.set_xlabel("update")
    _finish(axes, chart)
    if len(chart.series) > 1:
        axes.legend(frameon=False)


def draw_map(axes: Any, one: Map) -> None:
    """Draw a map on matplotlib's axes, and its scale beside it."""
    values = [[float("nan") if v is None else v for v in row] for row in one.values]
    image = axes.imshow(values, cmap="Blues", aspect="auto", vmin=one.low, vmax=one.high)
    axes.set_yticks(range(len(one.rows)), one.rows)
    every = max(1, len(one.columns) // 10)
    axes.set_xticks(range(0, len(one.columns), every), one.columns[::every])
    axes.set_xlabel("layer")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: one.show(value))
    bar.outline.set_visible(False)
    _finish(axes, one)


def map_inches(one: Map) -> tuple[float, float]:
    """Return the width and height that a map can be read at."""
    return max(5.0, 0.22 * len(one.columns) + 2), 0.32 * len(one.rows) + 1.4


def _finish(axes: Any, one: Chart | Map) -> None:
    note = f"\n{one.note}" if one.note else ""
    axes.set_title(f"{one.title}{note}", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
