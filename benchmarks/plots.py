"""Draw the figures of docs/benchmarks.md from the results; each carries the sum of its data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from method_results import LABELS, MAIN, MIB, PARTS, Cell

FIGURES = Path(__file__).parent.parent / "docs/figures"
COLORS = ("#3b6ea5", "#7fb0d8", "#e0a458", "#9c4f4f", "#7a9e7e", "#b8a9c9")
KINDS = ("saved", "optimizer", "gradients", "trained", "indices", "originals")
SWEPT = ("lora", "shira", "spiel_sparse", "s2ft_sparse")


def data(cells: dict[str, Cell]) -> dict[str, Any]:
    """Return what each figure shows: {figure: its numbers}."""
    main = cells[MAIN]
    step = {c: {p: f.seconds(p) for p in PARTS} for c, f in main.items()}
    held = {
        case: {kind: found.saved if kind == "saved" else found.bytes[kind] for kind in KINDS}
        for case, found in main.items()
    }
    sweep: dict[str, dict[str, dict[str, float]]] = {}
    for name, cell in cells.items():
        dtype, _, size = name.partition("-")
        if "-" not in size:
            tokens = str(int(size.split("x")[0]) * int(size.split("x")[1]))
            for case in SWEPT:
                if case in cell and not size.startswith("1x512"):
                    lines = sweep.setdefault(f"{case} {dtype}", {})
                    lines[tokens] = round(cell[case].ratio(cell["floor"])[0], 4)
    return {"step": step, "bytes": held, "sweep": sweep}


def is_current(name: str, numbers: Any) -> bool:
    """Tell whether a figure was drawn from these numbers."""
    path = FIGURES / f"{name}.png"
    return path.is_file() and _sum(numbers).encode() in path.read_bytes()


def draw(cells: dict[str, Cell]) -> list[Path]:
    """Draw the figures that are out of date; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    FIGURES.mkdir(exist_ok=True)
    drawn = []
    drawing = {"step": _step, "bytes": _bytes, "sweep": _sweep}
    for name, numbers in data(cells).items():
        if not is_current(name, numbers):
            figure = drawing[name](numbers)
            path = FIGURES / f"{name}.png"
            notes = {"Software": None, "Description": _sum(numbers)}
            figure.savefig(path, dpi=110, metadata=notes, bbox_inches="tight")
            drawn.append(path)
    return drawn


def _sum(numbers: Any) -> str:
    text = json.dumps(numbers, sort_keys=True)
    return "data sha256 " + hashlib.sha256(text.encode()).hexdigest()


def _stacked(rows: dict[str, dict[str, float]], scale: float, axis_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.36 * len(rows) + 1))
    axes = figure.subplots()
    labels = [LABELS[case] for case in rows]
    left = [0.0] * len(rows)
    for color, kind in zip(COLORS, next(iter(rows.values())), strict=False):
        widths = [row[kind] / scale for row in rows.values()]
        axes.barh(labels, widths, left=left, color=color, label=kind, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(axis_label)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _step(rows: dict[str, dict[str, float]]) -> Any:
    figure, axes = _stacked(rows, 1.0, f"CPU seconds of a training step, {MAIN}")
    axes.axvline(sum(rows["floor"].values()), color="black", linewidth=0.8, linestyle=":")
    return figure


def _bytes(rows: dict[str, dict[str, float]]) -> Any:
    shown = {case: row for case, row in rows.items() if case != "full"}
    label = f"MiB beside the frozen weights, {MAIN} (saved: kept for backward)"
    return _stacked(shown, MIB, label)[0]


def _sweep(lines: dict[str, dict[str, float]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    for name, points in sorted(lines.items()):
        case, _, dtype = name.partition(" ")
        tokens = sorted(map(int, points))
        color = COLORS[SWEPT.index(case)]
        style = "-" if dtype == "float32" else "--"
        heights = [points[str(t)] for t in tokens]
        label = f"{LABELS[case]}, {dtype}"
        axes.plot(tokens, heights, style, color=color, marker="o", label=label)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({int(t) for points in lines.values() for t in points})
    axes.set_xticks(ticks, labels=[str(t) for t in ticks])
    axes.set_xlabel("tokens in a batch")
    axes.set_ylabel("step time over the frozen floor")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
