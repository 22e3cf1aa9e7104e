"""`sft plot`: curves of a run, and a map of what its adapter changes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.errors import UserError, one_line
from sft.report.charts import Chart, Map, Point, Series
from sft.report.maps import laid_out
from sft.report.numbers import figure
from sft.report.plots import can_plot, draw_chart, draw_map, map_inches
from sft.run.folder import LOG
from sft.tools.describe import describe
from sft.tools.opened import is_adapter

FORMATS = (".png", ".svg", ".pdf")

# Measured at every log line, and no curve of learning.
_NOT_CURVES = ("step", "epoch", "time", "seconds", "total_flos", "num_input_tokens_seen")
_WIDTH, _PANEL = 9.0, 2.6  # inches
_FONT = 8  # points


def plot(target: Path, out: Path, base: str | None = None) -> list[str]:
    """Draw a run or an adapter.

    Args:
        target: folder of a run, whose curves are drawn, or of an adapter or delta.
        out: file to write: .png, .svg or .pdf.
        base: of a whole model, what it is compared with.

    Returns:
        What was drawn.

    Raises:
        UserError: there is nothing to draw, or it cannot be written.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out: got {out.name}, allowed are {', '.join(FORMATS)}")
    if not target.is_dir():
        raise UserError(f"{target}: no such folder; give that of a run or of an adapter")
    if not can_plot():
        raise UserError('plot: needs the package matplotlib: pip install "sparse-sft[plot]"')
    charts = _charts(read_log(target / LOG)) if (target / LOG).is_file() else []
    changed = _map(describe(target, base)) if is_adapter(target) or not charts else None
    if not charts and changed is None:
        raise UserError(f"{target}: holds no curve and no change; there is nothing to draw")
    _write(charts, changed, str(target), out)
    return [chart.key for chart in charts] + ([] if changed is None else [changed.key])


def read_log(path: Path) -> dict[str, list[Point]]:
    """Return the numbers of a run's log as (step, value), by key.

    A last line without an end was cut short when the run was killed; it is left out.

    Raises:
        UserError: a line is no JSON object.
    """
    found: dict[str, list[Point]] = {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            text = f"{path}:{number}: is no log line ({one_line(error)[:100]}); take it out"
            raise UserError(text) from error
        if "event" in entry:
            continue
        for key, value in entry.items():
            number_ = isinstance(value, int | float) and not isinstance(value, bool)
            if number_ and key not in _NOT_CURVES and math.isfinite(value):
                found.setdefault(key, []).append((step, float(value)))
    return found


def _charts(series: Mapping[str, list[Point]]) -> list[Chart]:
    """Put what is measured in one unit into one chart; a curve has two points at least."""
    charts: dict[str, Chart] = {}
    for key, points in series.items():
        if len(points) > 1:
            name = key.removeprefix("eval_")
            chart = charts.setdefault(name, Chart(name, name.replace("_", " "), []))
            chart.series.append(Series(key, points))
    first = [name for name in ("loss", "learning_rate") if name in charts]
    return [charts[name] for name in [*first, *sorted(charts.keys() - set(first))]]


def _map(described: Mapping[str, Any]) -> Map | None:
    """Map the root mean square of each module's delta."""
    sizes = {
        name: row["delta_norm"] / math.sqrt(row["weights"])
        for name, row in described["modules"].items()
    }
    title = f"{described['method']}: root mean square of the change of a weight"
    return laid_out("|delta| by layer and type", title, sizes, figure)


def _write(charts: Sequence[Chart], changed: Map | None, title: str, out: Path) -> None:
    """Draw two charts a row, and the map under them."""
    import matplotlib
    from matplotlib.figure import Figure

    heights = [_PANEL] * math.ceil(len(charts) / 2)
    if changed is not None:
        heights.append(map_inches(changed)[1])
    with matplotlib.rc_context({"font.size": _FONT}):
        sheet = Figure(figsize=(_WIDTH, max(sum(heights), _PANEL)), layout="constrained")
        sheet.suptitle(title)
        grid = sheet.add_gridspec(len(heights), 2, height_ratios=heights)
        for index, chart in enumerate(charts):
            alone = index == len(charts) - 1 and index % 2 == 0
            draw_chart(
                sheet.add_subplot(grid[index // 2, slice(None) if alone else index % 2]), chart
            )
        if changed is not None:
            draw_map(sheet.add_subplot(grid[-1, :]), changed)
        _save(sheet, out)


def _save(sheet: Any, out: Path) -> None:
    """Write the file, whole or not at all."""
    temporary = out.with_name(f".{out.name}")
    try:
        sheet.savefig(temporary, dpi=150, format=out.suffix[1:])
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def names(drawn: Sequence[str]) -> str:
    """Return what was drawn as a list in words."""
    return ", ".join(name.replace("_", " ") for name in drawn)
