"""`sft plot`: curves of a run, and a map of what its adapter changes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.errors import UserError, one_line
from sft.tools.describe import describe, layer_of, type_of
from sft.tools.opened import is_adapter

LOG = "log.jsonl"
FORMATS = (".png", ".svg", ".pdf")

Series = dict[str, list[tuple[float, float]]]

# Measured at every log line, and no curve of learning.
_NOT_CURVES = ("step", "epoch", "time", "seconds", "total_flos", "num_input_tokens_seen")
_WIDTH, _PANEL = 9.0, 2.6  # inches
_INKS = ("#3b6fb6", "#c8553d", "#4f8a4a", "#8a5a9e", "#b8862b", "#3a8f93")


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
    curves = _panels(read_log(target / LOG)) if (target / LOG).is_file() else {}
    described = describe(target, base) if is_adapter(target) or not curves else None
    figure = _figure(curves, described, str(target))
    _save(figure, out)
    return [*curves, *(["|delta| by layer and type"] if described is not None else [])]


def read_log(path: Path) -> Series:
    """Return the numbers of a run's log as (step, value), by key.

    Raises:
        UserError: a line is no JSON object.
    """
    found: Series = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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


def _panels(series: Series) -> dict[str, Series]:
    """Put what is measured in one unit into one panel; a curve has two points at least."""
    drawn = {key: points for key, points in series.items() if len(points) > 1}
    panels: dict[str, Series] = {}
    for key, points in drawn.items():
        name = key.removeprefix("eval_")
        panels.setdefault(name, {})[key] = points
    first = [name for name in ("loss", "learning_rate") if name in panels]
    return {name: panels[name] for name in [*first, *sorted(panels.keys() - set(first))]}


def _figure(curves: dict[str, Series], described: Mapping[str, Any] | None, title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            'plot: needs the package matplotlib: pip install "sparse-sft[plot]"'
        ) from None
    rows = math.ceil(len(curves) / 2)
    layers = len(described["layers"]) if described else 0
    tall = 1.2 + 0.16 * layers if described else 0.0
    figure = Figure(figsize=(_WIDTH, max(_PANEL * rows + tall, _PANEL)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    heights = [_PANEL] * rows + ([tall] if described else [])
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for index, (name, series) in enumerate(curves.items()):
        last = index == len(curves) - 1 and index % 2 == 0
        place = grid[index // 2, :] if last else grid[index // 2, index % 2]
        _draw_curves(figure.add_subplot(place), name, series)
    if described is not None:
        _draw_map(figure, figure.add_subplot(grid[rows, :]), described)
    return figure


def _draw_curves(axes: Any, name: str, series: Series) -> None:
    for ink, (key, points) in zip(_INKS, series.items(), strict=False):
        steps, values = zip(*points, strict=True)
        mark = "o" if len(points) < 30 else ""
        axes.plot(steps, values, label=key, color=ink, linewidth=1.6, marker=mark, markersize=3)
    axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _draw_map(figure: Any, axes: Any, described: Mapping[str, Any]) -> None:
    """Draw the root mean square of each module's delta, a cell a module."""
    layers, types = list(described["layers"]), list(described["types"])
    cells = [[math.nan] * len(types) for _ in layers]
    for name, row in described["modules"].items():
        size = row["delta_norm"] / math.sqrt(row["weights"])
        cells[layers.index(layer_of(name))][types.index(type_of(name))] = size
    image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(types)), types, fontsize=8)
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    kind = f"{described['method']}: root mean square of the change of a weight"
    axes.set_title(kind, fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _save(figure: Any, out: Path) -> None:
    """Write the file, whole or not at all."""
    temporary = out.with_name(f".{out.name}")
    try:
        figure.savefig(temporary, dpi=150, format=out.suffix[1:])
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def names(drawn: Sequence[str]) -> str:
    """Return what was drawn as a list in words."""
    return ", ".join(name.replace("_", " ") for name in drawn)
