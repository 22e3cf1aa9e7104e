"""Descriptions and comparisons as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Cell = Callable[[Row], str]

_BAR = 12  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉█"

_DESCRIBED: dict[str, Cell] = {
    "trained": lambda row: f"{row['trained']:,}",
    "density": lambda row: percent(row["density"]),
    "|delta|": lambda row: f"{row['delta_norm']:.3g}",
    "largest": lambda row: f"{row['delta_max']:.3g}",
}
_COMPARED: dict[str, Cell] = {
    "shared": lambda row: f"{row['shared']:,}",
    "jaccard": lambda row: f"{row['jaccard']:.3f}",
    "opposite": lambda row: percent(row["conflict"]),
    "distance": lambda row: f"{row['distance']:.3g}",
    "cosine": lambda row: f"{row['cosine']:.3f}",
}


def show_description(
    console: Console, name: str, found: Mapping[str, Any], *, modules: bool = False
) -> None:
    """Print what a folder changes.

    Args:
        console: to print to.
        name: of the folder.
        found: of `describe`.
        modules: print every module, not layers and types alone.
    """
    line(console, name)
    line(console, f"  {found['method']} on {found['base']}")
    shape = f"{found['trained']:,} trained values in {len(found['modules'])} modules"
    reached = f"reach {percent(found['density'])} of their {found['weights']:,} weights"
    line(console, f"  {shape} {reached}")
    ranks = found.get("ranks")
    rank = f", rank {_range(ranks)}" if ranks else ""
    size = f"|delta| {found['delta_norm']:.3g}, largest {found['delta_max']:.3g}"
    line(console, f"  {size}{rank}")
    if found["dense"]:
        line(console, f"  trained whole besides: {', '.join(found['dense'])}")
    line(console, f"  support {found['support_hash'][:16]}\n")
    columns = dict(_DESCRIBED)
    if ranks:
        columns["rank"] = lambda row: _range(row.get("ranks") or [row["rank"]] * 2)
    for title, key in _sections(modules):
        bar = None if key == "modules" else "delta_norm"
        _print(console, _table(title, found[key], columns, bar))


def show_comparison(
    console: Console, names: tuple[str, str], found: Mapping[str, Any], *, modules: bool = False
) -> None:
    """Print how two changes differ.

    Args:
        console: to print to.
        names: of both.
        found: of `compare`.
        modules: print every module, not layers and types alone.
    """
    for name, key in zip(names, ("first", "second"), strict=True):
        line(console, f"{key:<6}  {name}: {found[key]:,} positions")
    shared = f"{found['shared']:,} in common, jaccard {found['jaccard']:.3f}"
    line(console, f"{shared}; of these {percent(found['conflict'])} with opposite signs")
    line(console, f"distance {found['distance']:.3g}, cosine {found['cosine']:.3f}\n")
    for title, key in _sections(modules):
        _print(
            console, _table(title, found[key], _COMPARED, None if key == "modules" else "jaccard")
        )


def show_overlaps(console: Console, overlaps: Mapping[tuple[int, int], Row]) -> None:
    """Print how much each pair of several adapters has in common, by their numbers."""
    rows = {f"{i + 1} and {j + 1}": row for (i, j), row in overlaps.items()}
    wanted = ("shared", "jaccard", "opposite", "cosine")
    _print(console, _table("overlap", rows, {key: _COMPARED[key] for key in wanted}, "jaccard"))


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.3g} %"


def line(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours, no breaks that a pipe would meet."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _sections(modules: bool) -> Iterable[tuple[str, str]]:
    return [("module", "modules")] if modules else [("type", "types"), ("layer", "layers")]


def _table(
    title: str, rows: Mapping[str, Row], columns: Mapping[str, Cell], bar: str | None
) -> Any:
    """Return a table with a line for each row, and perhaps a bar for one of its numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, no_wrap=title != "module", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    if bar is not None:
        table.add_column("", no_wrap=True)
    largest = max((float(row[bar]) for row in rows.values()), default=0.0) if bar else 0.0
    most = 1.0 if bar == "jaccard" else largest
    for name, row in rows.items():
        cells = [cell(row) for cell in columns.values()]
        if bar is not None:
            cells.append(_bar(float(row[bar]) / most if most else 0.0))
        table.add_row(Text(name), *map(Text, cells))
    return table


def _bar(share: float) -> str:
    if not math.isfinite(share):
        return ""  # a delta that holds NaN
    whole, part = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + (_EIGHTHS[part] if part else "")


def _range(ends: Iterable[int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"
