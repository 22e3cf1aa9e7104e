"""How far two changes of one base agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from sft.errors import UserError
from sft.tools.aligned import align
from sft.tools.change import Change
from sft.tools.describe import in_order, layer_of, type_of
from sft.tools.found import Changes, pairs

Row = dict[str, Any]

# What adds up over modules; the rest follows from it.
_SUMS = ("first", "second", "shared", "opposite", "first_square", "second_square", "product")


def compare(first: Changes, second: Changes) -> dict[str, Any]:
    """Compare two changes, module by module.

    Returns:
        {modules, layers, types, and the totals}, each with

            first, second: positions that either reaches
            shared, jaccard: positions of both, and their share of those of any
            opposite, conflict: of those, where the signs differ, and their share
            distance: |first - second|
            cosine: between both, 0 where one is 0

    Raises:
        UserError: a weight has two shapes.
    """
    modules = {name: compare_change(name, a, b) for name, a, b in pairs(first, second)}
    return {
        **total(modules.values()),
        "modules": {name: total([row]) for name, row in modules.items()},
        "layers": _grouped(modules, layer_of),
        "types": _grouped(modules, type_of),
    }


def compare_change(name: str, first: Change | None, second: Change | None) -> Row:
    """Count what adds up over modules; a change that is missing reaches nothing.

    Raises:
        UserError: the changes are of weights of different shapes.
    """
    if first is not None and second is not None and first.shape != second.shape:
        raise UserError(
            f"diff: {name} is {first.shape} in one and {second.shape} in the other; compare "
            "changes of one base"
        )
    known = first or second
    assert known is not None
    both = align(known.shape, [first, second])
    shared = both.present.all(0)
    one, other = both.values.double()
    return {
        "first": int(both.present[0].sum()),
        "second": int(both.present[1].sum()),
        "shared": int(shared.sum()),
        "opposite": int((one * other < 0).sum()),
        "first_square": float(one @ one),
        "second_square": float(other @ other),
        "product": float(one @ other),
        "gap_square": float((one - other).square().sum()),
    }


def total(rows: Iterable[Row]) -> Row:
    """Sum modules up, and say what follows."""
    held = list(rows)
    sums = {key: sum(row[key] for row in held) for key in (*_SUMS, "gap_square")}
    any_of = sums["first"] + sums["second"] - sums["shared"]
    norms = math.sqrt(sums["first_square"] * sums["second_square"])
    return {
        "first": sums["first"],
        "second": sums["second"],
        "shared": sums["shared"],
        "jaccard": sums["shared"] / any_of if any_of else 1.0,
        "opposite": sums["opposite"],
        "conflict": sums["opposite"] / sums["shared"] if sums["shared"] else 0.0,
        "distance": math.sqrt(sums["gap_square"]),
        "cosine": sums["product"] / norms if norms else 0.0,
    }


def _grouped(modules: dict[str, Row], key: Callable[[str], str]) -> dict[str, Row]:
    groups: dict[str, list[Row]] = {}
    for name, row in modules.items():
        groups.setdefault(key(name), []).append(row)
    return {name: total(groups[name]) for name in in_order(groups)}
