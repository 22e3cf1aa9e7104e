"""What a log or a checkpoint says of its run, and how two runs differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch

from sft.kernels.mask import Magnitude, Mask, Random
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.trained import Trained

FORMAT = 1
# what decides where the updates of a log lead, beside the trained set
DECISIVE = (
    "seed", "noise", "update", "mode", "queries", "sparsity", "mask", "log_dtype", "momentum",
    "betas",
)  # fmt: skip


def describe(
    config: ZerothOrderConfig,
    groups: Sequence[Mapping[str, Any]],
    trained: Iterable[Trained],
    *,
    seed: int,
    queries: int,
) -> dict[str, Any]:
    """Return the header of a run's log, of values that JSON takes.

    Args:
        config: its fields are entries of the header.
        groups: parameter groups, with their weight decay.
        trained: the trained set; each tensor in one of the groups.
        seed: of the run.
        queries: directions an update, over all processes.

    Returns:
        the fields of the config, with `seed` and `queries` as given, and
        format: of the file; versions: of the packages; rule: the field `update`;
        groups: [{"weight_decay"}];
        trained: [name, shape, dtype, group, mask] of each tensor, with mask the threshold of a
        magnitude mask, [key, share] of a random one, or None;
        start_sha, end_sha: None, for whoever knows the hashes of the weights.
    """
    place = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("sparse-sft", "torch")},
        **config.plain(),
        "seed": seed,
        "queries": queries,
        "rule": config.update,
        "groups": [{"weight_decay": float(group["weight_decay"])} for group in groups],
        "trained": [
            [
                t.name,
                list(t.parameter.shape),
                str(t.parameter.dtype).removeprefix("torch."),
                place[id(t.parameter)],
                _plain_mask(t.mask),
            ]
            for t in trained
        ],
        "start_sha": None,
        "end_sha": None,
    }


def config_of(header: Mapping[str, Any]) -> ZerothOrderConfig:
    """Return the configuration of a header, with the objective left out: a name is no function."""
    known = {field.name: header[field.name] for field in fields(ZerothOrderConfig)}
    return ZerothOrderConfig(**{**known, "objective": "loss"})


def mask_of(row: Sequence[Any]) -> Mask | None:
    """Return the mask of a row of `trained`."""
    mask = row[4]
    if mask is None:
        return None
    return Random(*mask) if isinstance(mask, (list, tuple)) else Magnitude(mask)


def difference(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Say what makes two runs different ones, "key: got ..., allowed is ...", or return None.

    Thresholds of magnitude masks are left out, see `other_threshold`.
    """
    for key in DECISIVE:
        if saved[key] != own[key]:
            return f"{key}: got {own[key]!r}, allowed is {saved[key]!r}, that of the saved run"
    theirs, mine = ({row[0]: row for row in side["trained"]} for side in (saved, own))
    if theirs.keys() != mine.keys():
        missing, added = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
        return f"trained set: lacks {_some(missing)} of the saved run, adds {_some(added)}"
    for name, row in theirs.items():
        for what, a, b in zip(("shape", "dtype", "group"), row[1:4], mine[name][1:4], strict=True):
            if a != b:
                return f"trained set: {name} has {what} {b}, in the saved run {a}"
    return None


def other_threshold(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Name the first tensor whose magnitude threshold is another, or return None."""
    theirs = {row[0]: row[4] for row in saved["trained"]}
    for name, *_, mask in own["trained"]:
        if mask != theirs[name]:
            return f"thresholds: {name} has {mask:g}, in the saved run {theirs[name]:g}"
    return None


def check_header(header: Any) -> None:
    """Raise ValueError unless a header, as read from a file, is one that `describe` can return."""
    _require(isinstance(header, dict), "its header is no object")
    _require(header.get("format") == FORMAT, f"its format is {header.get('format')!r}")
    needed = {field.name for field in fields(ZerothOrderConfig)} | {"groups", "trained"}
    missing = sorted(needed - header.keys())
    _require(not missing, f"its header lacks {', '.join(missing)}")
    config_of(header)
    _require(isinstance(header["seed"], int) and header["seed"] >= 0, "its seed is no number >= 0")
    groups, trained = header["groups"], header["trained"]
    _require(isinstance(groups, list) and len(groups) > 0, "it has no groups")
    for group in groups:
        fits = isinstance(group, dict) and _number(group.get("weight_decay"))
        _require(fits, "the weight decay of a group is no number >= 0")
    _require(isinstance(trained, list) and len(trained) > 0, "it has no trained set")
    for row in trained:
        _require(_is_row(row, len(groups)), f"{str(row)[:80]} is no entry of a trained set")
        mask_of(row)
    _require(len({row[0] for row in trained}) == len(trained), "a name is in its trained set twice")


def _is_row(row: Any, groups: int) -> bool:
    if not isinstance(row, (list, tuple)) or len(row) != 5:
        return False
    name, shape, dtype, group, mask = row
    sized = isinstance(shape, (list, tuple)) and all(_count(size) for size in shape)
    typed = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    return (
        isinstance(name, str) and sized and typed and _count(group) and group < groups
    ) and _is_mask(mask)


def _is_mask(mask: Any) -> bool:
    if isinstance(mask, (list, tuple)):
        return len(mask) == 2 and _count(mask[0]) and _number(mask[1])
    return mask is None or _number(mask)


def _plain_mask(mask: Mask | None) -> Any:
    if mask is None:
        return None
    return [mask.key, mask.share] if isinstance(mask, Random) else mask.threshold


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value) and value >= 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(otherwise)
