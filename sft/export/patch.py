"""A patch: the weights that training changed, in a checkpoint's own names and flat positions.

A folder with `patch.safetensors`, for each changed tensor `NAME.indices` (sorted, unique, int32 or
int64) and `NAME.values` (the new weights, in the type of the checkpoint), and `patch.json`, what it
fits. A tensor most of which changed has `NAME.values` alone, all of them. Servers that hold the
base write the values in place; vLLM's `CheckpointWeightPatch` has the fields of `Patch`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft.errors import UserError, one_line
from sft.export.delta import differing
from sft.export.trained import TrainedWeights

TENSORS, CONTENT, FORMAT = "patch.safetensors", "patch.json", 1


class Patch(NamedTuple):
    """New weights of one tensor, as vLLM takes them.

    Args:
        name: of the tensor in the checkpoint.
        shape: of all of it.
        dtype: of the checkpoint.
        values: (k,) new weights; without indices, all of them.
        indices: (k,) flat positions, ascending; or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None


class PatchCounts(NamedTuple):
    """What a patch holds: changed weights, all weights of the model, bytes."""

    changed: int
    total: int
    bytes: int

    def line(self) -> str:
        """Say it."""
        share = 100 * self.changed / self.total
        return f"{self.changed:,} of {self.total:,} weights ({share:.3g} %), {self.bytes:,} bytes"


def is_patch(folder: Path) -> bool:
    """Tell whether a folder holds a patch."""
    return (folder / CONTENT).is_file()


def write_patch(weights: TrainedWeights, folder: Path, base: str) -> PatchCounts:
    """Write what differs from the base, one tensor after another.

    Args:
        weights: trained ones, which know their base.
        folder: exists.
        base: name of the base, noted in the patch.

    Raises:
        UserError: the base has no place for a weight, or one is not a number.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    changed = 0
    for name in weights.changed():
        old, new = _pair(weights, name)
        indices = differing(old, new)
        if not len(indices):
            continue
        changed += len(indices)
        notes[name] = {"shape": list(new.shape), "dtype": str(new.dtype).removeprefix("torch.")}
        flat = new.flatten()
        kind = torch.int32 if flat.numel() < 2**31 else torch.int64
        if (
            len(indices) * (kind.itemsize + flat.dtype.itemsize)
            < flat.numel() * flat.dtype.itemsize
        ):
            tensors[f"{name}.indices"], flat = indices.to(kind), flat[indices]
            notes[name]["before"] = digest(old.flatten()[indices])
        else:
            notes[name]["before"] = digest(old)
        tensors[f"{name}.values"] = flat.contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    content = {"format": FORMAT, "base": base, "tensors": notes}
    (folder / CONTENT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    total = sum(torch.Size(weights.slot(name).shape).numel() for name in weights.names())
    return PatchCounts(changed, total, (folder / TENSORS).stat().st_size)


def read_patches(folder: Path) -> list[Patch]:
    """Return the patches of a folder, each checked.

    Raises:
        UserError: it is damaged.
    """
    return [patch for patch, _ in _read(folder)]


@torch.no_grad()
def apply_patches(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a patch into the weights of its base, in place: a model's parameters, or loaded files.

    Args:
        tensors: by their names in the checkpoint.
        folder: what `write_patch` wrote.

    Raises:
        UserError: it is damaged, or these are other weights than it was made for. Nothing has been
            written then.
    """
    found = open_patches(folder)
    for patch, before in found.values():
        check_fits(tensors.get(patch.name), patch, before, folder)
    for patch, _ in found.values():
        write_one(tensors[patch.name], patch)


def open_patches(folder: Path) -> dict[str, tuple[Patch, str]]:
    """Return the patches of a folder with the digests of what they replace, by name.

    Raises:
        UserError: it is damaged.
    """
    return {patch.name: (patch, before) for patch, before in _read(folder)}


def check_fits(tensor: Tensor | None, patch: Patch, before: str, folder: Path) -> None:
    """Raise UserError unless a tensor is the one that a patch was made for."""
    if tensor is None or tuple(tensor.shape) != patch.shape or tensor.dtype != patch.dtype:
        has = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UserError(
            f"{folder}: {patch.name} is {patch.dtype} {patch.shape} where it was made, "
            f"here it is {has}; give the base of the patch"
        )
    flat = tensor.detach().flatten()
    old = flat if patch.indices is None else flat[patch.indices.long().to(flat.device)]
    if digest(old) != before:
        raise UserError(
            f"{folder}: was made for other weights of {patch.name}; give the base of the patch"
        )


def write_one(tensor: Tensor, patch: Patch) -> None:
    """Write one patch into its tensor."""
    flat = tensor.detach().view(-1)
    values = patch.values.to(flat.device)
    if patch.indices is None:
        flat.copy_(values)
    else:
        flat[patch.indices.long().to(flat.device)] = values


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bits."""
    held = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()


def patched_base(folder: Path) -> str:
    """Return the name of the base that a patch was made for."""
    return str(_content(folder)["base"])


def _pair(weights: TrainedWeights, name: str) -> tuple[Tensor, Tensor]:
    old, new = weights.before(name), weights.read(name)
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        raise UserError(
            f"--to patch: {name} of the trained model has no such place in the base; use --to "
            "merged"
        )
    if bool(new.isnan().any()):
        raise UserError(f"--to patch: {name} holds NaN; the training went wrong")
    return old, new


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        dict(content["tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: is no whole patch ({one_line(error)[:200]}); write it again"
        ) from error
    return dict(content)


def _read(folder: Path) -> Iterator[tuple[Patch, str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    notes = _content(folder)["tensors"]
    try:
        tensors = load_file(folder / TENSORS)
        for name, note in notes.items():
            dtype, shape = getattr(torch, note["dtype"]), tuple(note["shape"])
            values, indices = tensors[f"{name}.values"], tensors.get(f"{name}.indices")
            patch = Patch(name, shape, dtype, values, indices)
            _check(patch)
            yield patch, note["before"]
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: is damaged ({one_line(error)[:200]}); write it again"
        ) from error


def _check(patch: Patch) -> None:
    """Raise ValueError unless positions and values fit one another and the tensor."""
    numel, values, indices = torch.Size(patch.shape).numel(), patch.values, patch.indices
    count = numel if indices is None else indices.numel()
    if values.dim() != 1 or values.numel() != count or values.dtype != patch.dtype:
        raise ValueError(f"{patch.name}: {values.numel()} {values.dtype} values")
    if bool(values.isnan().any()):
        raise ValueError(f"{patch.name}: holds NaN")
    if indices is None or not count:
        return
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{patch.name}: positions of {indices.dtype}")
    inside = int(indices[0]) >= 0 and int(indices[-1]) < numel
    if not inside or not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"{patch.name}: positions are not ascending in [0, {numel})")
