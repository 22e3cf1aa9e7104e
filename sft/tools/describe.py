"""What an adapter changes, in numbers: by module, by layer and by type of module."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sft.tools.change import Change
from sft.tools.found import AdapterChanges, Changes, find_changes
from sft.tools.opened import Opened

Row = dict[str, Any]


def describe(target: Any, base: str | None = None, *, adapter: str | None = None) -> dict[str, Any]:
    """Describe what was trained.

    Args:
        target: a PeftModel whose weights are not resident; or the folder of an adapter, a run, a
            delta, or, with a base, a whole model.
        base: of a folder, what it is compared with; default: as it says.
        adapter: of a model; default: the active one.

    Returns:
        {method, base, trained, weights, density, delta_norm, delta_max, support_hash, modules,
        layers, types, dense}. `modules` holds {shape, trained, reached, density, delta_norm,
        delta_max} and perhaps {rank} by name; `layers` and `types` the same, summed up.

    Raises:
        UserError: the folder is none of these.
    """
    return describe_changes(_changes(target, base, adapter))


def describe_changes(changes: Changes) -> dict[str, Any]:
    """Describe differences that have been found already."""
    modules: dict[str, Row] = {}
    digest = hashlib.sha256()
    for name in changes.names():
        change = changes.read(name)
        modules[name] = describe_change(change)
        digest.update(name.encode())
        digest.update(b"all" if change.indices is None else change.indices.numpy().tobytes())
    total = sum_up(modules.values())
    found = {"method": changes.method, "base": changes.base, **total}
    found |= {"support_hash": digest.hexdigest(), "modules": modules}
    found |= {"layers": _grouped(modules, layer_of), "types": _grouped(modules, type_of)}
    dense = changes.opened.whole() if isinstance(changes, AdapterChanges) else {}
    return found | {"dense": {name: list(p.shape) for name, p in dense.items()}}


def describe_change(change: Change) -> Row:
    """Describe what one weight has become."""
    values = change.values.double()
    row: Row = {
        "shape": list(change.shape),
        "weights": change.numel,
        "trained": change.trained,
        "reached": len(values),
        "density": change.density,
        "delta_norm": float(values.norm()),
        "delta_max": float(values.abs().max()) if len(values) else 0.0,
    }
    return row if change.rank is None else {**row, "rank": change.rank}


def sum_up(rows: Iterable[Row]) -> Row:
    """Add rows up: counts, the norm of all, the largest entry, the smallest and largest rank."""
    held = list(rows)
    weights, reached = (sum(row[key] for row in held) for key in ("weights", "reached"))
    found: Row = {
        "weights": weights,
        "trained": sum(row["trained"] for row in held),
        "reached": reached,
        "density": reached / weights if weights else 0.0,
        "delta_norm": math.sqrt(sum(row["delta_norm"] ** 2 for row in held)),
        "delta_max": max((row["delta_max"] for row in held), default=0.0),
    }
    ranks = [row["rank"] for row in held if "rank" in row]
    return {**found, "ranks": [min(ranks), max(ranks)]} if ranks else found


def layer_of(name: str) -> str:
    """Return the number of the layer that a module lies in, or "-"."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return found.group(1) if found else "-"


def type_of(name: str) -> str:
    """Return what a module is called in every layer."""
    return name.rpartition(".")[2]


def in_order(names: Iterable[str]) -> list[str]:
    """Return layers by number; other names, which come first, in the order they have."""
    return sorted(names, key=lambda name: int(name) if name.isdecimal() else -1)


def _grouped(modules: dict[str, Row], key: Callable[[str], str]) -> dict[str, Row]:
    """Sum modules up by what `key` says of their names."""
    groups: dict[str, list[Row]] = {}
    for name, row in modules.items():
        groups.setdefault(key(name), []).append(row)
    return {
        name: {"modules": len(groups[name]), **sum_up(groups[name])} for name in in_order(groups)
    }


def _changes(target: Any, base: str | None, adapter: str | None) -> Changes:
    if isinstance(target, str | Path):
        return find_changes(str(target), base)
    name = adapter or target.active_adapter
    trained_on = target.peft_config[name].base_model_name_or_path or ""
    return AdapterChanges(Opened(target, name, trained_on))
