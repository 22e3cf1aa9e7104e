"""`sft compose`: one adapter out of several, layer by layer, without their base."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft.adapters.select import seeded
from sft.errors import UserError
from sft.tools.algebra import Request, check_request, combine
from sft.tools.aligned import align
from sft.tools.change import Change
from sft.tools.compare import compare_change, total
from sft.tools.found import AdapterChanges
from sft.tools.opened import find_adapter, open_adapter
from sft.tools.write_delta import write_delta
from sft.whole import refuse_target, written_whole

RECORD = "composition.json"


@dataclass
class Composed:
    """What composing gave.

    Args:
        changes: of the result, by module.
        conflicts: of each pair of adapters, by their numbers, as `compare` counts them.
        dropped: modules that nothing is left of.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    conflicts: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def compose(
    folders: Sequence[Path],
    request: Request,
    *,
    out: Path,
    base: str | None = None,
    overwrite: bool = False,
) -> Composed:
    """Combine adapters of one base into one that loads: a static SpIEL delta.

    Args:
        folders: of adapters, or of runs.
        request: operation, weights, density and seed.
        out: folder to write.
        base: what they were trained on; default: as they say, which has to be the same.
        overwrite: replace `out` when it is filled.

    Raises:
        UserError: they cannot be combined so, or not at all.
    """
    check_request(request, len(folders))
    places = [find_adapter(folder) for folder in folders]
    refuse_target(out, overwrite=overwrite, sources=places, option="--out")
    adapters = [AdapterChanges(open_adapter(place, base)) for place in places]
    fingerprints = _fingerprints(adapters)
    composed = _combined(adapters, request)
    if not composed.changes:
        raise UserError(f"{request.operation}: nothing is left in any module; give other adapters")
    record = {
        "operation": request.operation,
        "weights": list(request.weights),
        "density": request.density,
        "seed": request.seed,
        "adapters": [str(place) for place in places],
        "base": adapters[0].base,
    }
    with written_whole(out) as temporary:
        write_delta(temporary, composed.changes, fingerprints, adapters)
        text = json.dumps(record, indent=2) + "\n"
        (temporary / RECORD).write_text(text, encoding="utf-8")
        _check(temporary, composed.changes, base)
    return composed


def _combined(adapters: Sequence[AdapterChanges], request: Request) -> Composed:
    """Combine module by module; no more than one module of each adapter is dense at a time."""
    composed = Composed()
    known = [set(adapter.names()) for adapter in adapters]
    pairs = list(itertools.combinations(range(len(adapters)), 2))
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.names()):
        found = [
            adapter.read(name) if name in names else None
            for adapter, names in zip(adapters, known, strict=True)
        ]
        for i, j in pairs:
            if found[i] is not None or found[j] is not None:
                rows[i, j].append(compare_change(name, found[i], found[j]))
        change = _one(name, found, request)
        if len(change.values):
            composed.changes[name] = change
        else:
            composed.dropped.append(name)
    composed.conflicts = {pair: total(held) for pair, held in rows.items()}
    return composed


def _one(name: str, found: Sequence[Change | None], request: Request) -> Change:
    """Combine the changes of one module."""
    shapes = {change.shape for change in found if change is not None}
    if len(shapes) != 1:
        raise UserError(f"compose: {name} has the shapes {sorted(shapes)}; compose one base's")
    (shape,) = shapes
    if not all(bool(change.values.isfinite().all()) for change in found if change is not None):
        raise UserError(
            f"compose: {name} holds values that are not finite in one of the adapters; take an "
            "earlier checkpoint"
        )
    aligned = align(shape, found)
    values, where = combine(aligned, request, seeded(request.seed, "compose", name))
    if aligned.positions is None and bool(where.all()):
        return Change(shape, values, None, len(values))
    positions = torch.arange(len(values)) if aligned.positions is None else aligned.positions
    kept = values[where]
    return Change(shape, kept, positions[where], len(kept))


def _fingerprints(adapters: Sequence[AdapterChanges]) -> dict[str, int]:
    """Return the fingerprint of each module's base weight; 0 where no adapter knows it.

    Raises:
        UserError: the adapters were made for different weights.
    """
    found: dict[str, int] = {}
    for adapter in adapters:
        for name in adapter.names():
            own = adapter.fingerprint(name)
            if own and found.get(name) and own != found[name]:
                raise UserError(
                    f"compose: {adapters[0].opened.folder} and {adapter.opened.folder} were "
                    f"trained on different weights of {name}; compose adapters of one base"
                )
            found[name] = found.get(name) or own
    return found


def _check(folder: Path, wanted: dict[str, Change], base: str | None) -> None:
    """Read what was written, and compare it bit for bit."""
    written = AdapterChanges(open_adapter(folder, base))
    assert set(written.names()) == set(wanted)
    for name, change in wanted.items():
        again = written.read(name)
        assert torch.equal(again.support, change.support), name
        assert torch.equal(again.values, change.values), name
