"""Maps of what was trained: layer by type of module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sft.report.charts import Map
from sft.report.folder import RunFolder, Section
from sft.report.numbers import count, figure, percent
from sft.tools.describe import in_order, layer_of, type_of


def maps(run: RunFolder) -> list[Map]:
    """Return the maps that a run has figures for."""
    modules: dict[str, Section] = run.section("support").get("modules") or {}
    found = [
        laid_out(
            "density", "Trained share", _density(modules), percent, "of the weights of each module"
        ),
        laid_out(
            "change", "Size of the change", _change(modules), figure,
            "root mean square over the weights that it reaches",
        ),
        laid_out(
            "churn_by_module", "Churn by module", _churn(run, modules), percent,
            "positions that moved in the run, against those that are trained",
        ),
        laid_out("ranks_by_module", "Open ranks at the end", _ranks(run, modules), count),
    ]  # fmt: skip
    return [drawn for drawn in found if drawn is not None]


def laid_out(
    key: str, title: str, values: Mapping[str, float], show: Callable[[float], str], note: str = ""
) -> Map | None:
    """Lay values of modules out; those of equal place, such as experts, by their mean.

    Args:
        key: names the file of a plot.
        title: what is measured.
        values: by the name of the module.
        show: turns a value into text.
        note: one line under the title.

    Returns:
        the map, or None without any value.
    """
    if not values:
        return None
    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        cells.setdefault((type_of(name), layer_of(name)), []).append(value)
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    columns = in_order(dict.fromkeys(layer for _, layer in cells))
    table = [[_mean(cells.get((row, column))) for column in columns] for row in rows]
    return Map(key, title, rows, columns, table, show=show, note=note)


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _density(modules: Mapping[str, Section]) -> dict[str, float]:
    return _read(modules, lambda row: float(row["density"]))


def _change(modules: Mapping[str, Section]) -> dict[str, float]:
    return _read(
        modules, lambda row: row["delta_norm"] / math.sqrt(row.get("reached") or row["trained"])
    )


def _ranks(run: RunFolder, modules: Mapping[str, Section]) -> dict[str, float]:
    """Return ranks as the log left them, or as the adapter's files have them."""
    events = [line["ranks"] for line in run.lines if "ranks" in line]
    if events:
        return {name: float(rank) for name, rank in events[-1].items()}
    return _read(modules, lambda row: float(row["rank"]))


def _churn(run: RunFolder, modules: Mapping[str, Section]) -> dict[str, float]:
    """Return how often the trained positions of a module were exchanged, on average."""
    moved: dict[str, float] = {}
    for line in run.lines:
        if line.get("event") == "reselected":
            for name, number in line["modules"].items():
                moved[name] = moved.get(name, 0) + number
    return _read({n: modules.get(n, {}) | {"moved": m} for n, m in moved.items()},
                 lambda row: row["moved"] / row["trained"])  # fmt: skip


def _read(modules: Mapping[str, Section], value: Callable[[Section], float]) -> dict[str, float]:
    """Return a value of each module that has what it is made of."""
    found = {}
    for name, row in modules.items():
        try:
            found[name] = value(row)
        except (KeyError, TypeError, ZeroDivisionError):
            continue
    return found
