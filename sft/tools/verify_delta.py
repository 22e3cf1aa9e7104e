"""`sft verify` of a delta of the model itself: positions, values, both hashes of its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.adapters.support import check_indices
from sft.errors import UserError
from sft.export.delta import CONTENT, TENSORS
from sft.tools.found import DeltaChanges
from sft.tools.verify import Attempt, Check
from sft.tools.weights import Weights
from sft.zeroth_order.log import weights_sha


def verify_delta(folder: Path, base: str | None = None) -> list[Check]:
    """Check a delta.

    Args:
        folder: with delta.safetensors.
        base: what it is a delta of; default: as it says.
    """
    return list(_checks(folder, base))


def _checks(folder: Path, base: str | None) -> Iterator[Check]:
    done = Attempt()
    opened: list[DeltaChanges] = []
    yield done("files", lambda: _opened(folder, base, opened))
    if not opened:
        return
    content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
    yield done("values", lambda: _entries(folder, content))
    if done.failed:
        return
    weights = Weights(opened[0].base, None if base else content.get("revision"))
    yield done("base", lambda: _is(content, "base_sha", _before(weights, content)))
    if not done.failed:
        trained = _after(weights, folder, content)
        yield done("result", lambda: _is(content, "merged_sha", trained))


def _opened(folder: Path, base: str | None, opened: list[DeltaChanges]) -> str:
    changes = DeltaChanges(folder, base)
    opened.append(changes)
    return f"{len(changes.names())} changed weights of {changes.base}"


def _entries(folder: Path, content: dict[str, Any]) -> str:
    """Check positions and values of each weight."""
    from safetensors import safe_open

    count = 0
    with safe_open(folder / TENSORS, "pt") as file:
        known = set(file.keys())
        for name, shape in content["shapes"].items():
            if f"{name}.indices" not in known:
                continue
            indices = file.get_tensor(f"{name}.indices")
            numel = torch.Size(shape).numel()
            try:
                check_indices(indices, (numel, 1), f"{name}.indices")
            except ValueError as error:
                raise UserError(str(error)) from error
            values = file.get_tensor(f"{name}.values") if f"{name}.values" in known else None
            if values is None or values.shape != indices.shape:
                raise UserError(f"{name}.values: not one for each position; write the delta again")
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"{name}.values: not all finite; take an earlier checkpoint")
            count += len(indices)
    return f"{count:,} positions ascend and lie inside, their values are finite"


def _is(content: dict[str, Any], key: str, named: Iterator[tuple[str, Tensor]]) -> str:
    """Compare the hash of weights with the one noted."""
    found = weights_sha(named)
    if found != content[key]:
        what = "the weights of another base" if key == "base_sha" else "other weights than it notes"
        raise UserError(f"sha256 {found}: {what}; it notes {content[key]}")
    return f"sha256 {found}, as noted"


def _before(weights: Weights, content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's weights, in the type that they were trained in."""
    kind = getattr(torch, str(content.get("model_dtype")), None)
    for name in content["shapes"]:
        found = weights.parameter(name)
        if found is None:
            raise UserError(f"{weights.name} has no {name}; give the base of the delta")
        yield name, found.to(kind) if isinstance(kind, torch.dtype) else found


def _after(weights: Weights, folder: Path, content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained weights: the base's, with the delta's values in place."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, "pt") as file:
        known = set(file.keys())
        for name, old in _before(weights, content):
            new = old.clone()
            if f"{name}.indices" in known:
                where = file.get_tensor(f"{name}.indices").long()
                new.view(-1)[where] = file.get_tensor(f"{name}.values").to(new.dtype)
            yield name, new
