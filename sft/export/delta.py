"""A sparse delta of a whole model: the weights that changed, by position, and nothing else.

A folder with `delta.safetensors`, two tensors for each changed one (`NAME.indices`, sorted flat
positions; `NAME.values`, the new weights in the model's own type), and `delta.json`, what it fits.
Applying it writes the values: the result has the bits of the model that was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sft.errors import UserError
from sft.export.loaded import DTYPES, cast_of
from sft.export.merged import export_checked
from sft.export.shards import SHARD
from sft.models import load_model, load_tokenizer
from sft.recipe.schema import ModelSpec
from sft.whole import refuse_target, written_whole
from sft.zeroth_order.log import frozen_sha, weights_sha

TENSORS, CONTENT = "delta.safetensors", "delta.json"
FORMAT = 1
ENTRIES = {"format", "model", "revision", "model_dtype", "shapes", "base_sha", "merged_sha"}


def is_delta(folder: Path) -> bool:
    """Tell whether a folder holds a delta."""
    return (folder / CONTENT).is_file()


def delta_base(folder: Path) -> str:
    """Return the name of the base that a delta was made for; empty where it does not say."""
    return str(_read(folder)[0]["model"])


def save_delta(
    folder: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor], header: dict[str, Any]
) -> str:
    """Write what differs between two states of some tensors; return what to say of it.

    Args:
        folder: appears whole or not at all; replaced when it exists.
        before: tensors of the base, by full parameter name.
        after: of the trained model, same names, shapes and types.
        header: of the run's log; names the base.
    """
    tensors: dict[str, Tensor] = {}
    changed = total = 0
    for name, old in before.items():
        new = after[name].detach()
        indices = differing(old, new)
        changed, total = changed + indices.numel(), total + new.numel()
        if indices.numel():
            kind = torch.int32 if new.numel() < 2**31 else torch.int64
            tensors[f"{name}.indices"] = indices.to(kind).cpu()
            tensors[f"{name}.values"] = new.flatten()[indices].cpu()
    content = {
        "format": FORMAT,
        "model": header.get("model", ""),
        "revision": header.get("revision"),
        "model_dtype": header.get("model_dtype", "auto"),
        "shapes": {name: list(old.shape) for name, old in before.items()},
        "frozen_sha": header.get("frozen_sha"),
        "base_sha": weights_sha(before.items()),
        "merged_sha": weights_sha((name, after[name]) for name in before),
    }
    with written_whole(folder) as temporary:
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONTENT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return f"{changed:,} of {total:,} weights changed ({100 * changed / total:.2f} %)"


@torch.no_grad()
def apply_delta(model: nn.Module, folder: Path) -> None:
    """Write a delta's values into a model.

    Args:
        model: the base of the delta, bit for bit.
        folder: what `save_delta` wrote.

    Raises:
        UserError: the folder is damaged, or the model is another one.
    """
    content, tensors = _read(folder)
    own = dict(model.named_parameters())
    for name, shape in content["shapes"].items():
        if name not in own or list(own[name].shape) != shape:
            has = list(own[name].shape) if name in own else "no such parameter"
            raise UserError(f"{folder}: is of a base whose {name} is {shape}, this one has {has}")
    other = f"{folder}: is of another base; give the one of its run"
    _check_sha(own, content, "base_sha", other)
    if content.get("frozen_sha") not in (None, frozen_sha(model, content["shapes"])):
        raise UserError(other)
    damaged = f"{folder}: is damaged: it leads to other weights; write it again"
    for name in content["shapes"]:
        if f"{name}.indices" in tensors:
            flat = own[name].data.view(-1)
            indices, values = tensors[f"{name}.indices"], tensors.get(f"{name}.values")
            if values is None or not _fits(indices, values, len(flat)):
                raise UserError(damaged)
            flat[indices.long()] = values.to(flat.device, flat.dtype)
    _check_sha(own, content, "merged_sha", damaged)


def export_delta(
    folder: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
    max_shard_size: str = SHARD,
) -> float | None:
    """Write base and delta as a stock model, reload it and compare logits.

    Args:
        folder: of a delta.
        base: hub id, folder or embedded name; default: what the run started from.
        to: folder to write.
        dtype: cast of the merged weights; "auto" keeps the base's.
        overwrite: replace `to` when it is filled.
        verify: reload and compare.
        max_shard_size: of a file of weights.

    Returns:
        The largest |logit difference| between the reloaded model and the one in memory, if
        compared.

    Raises:
        UserError: the delta is damaged or not of this base, or `to` may not be written.
    """
    cast = cast_of(dtype)
    content, _ = _read(folder)
    name = base or content["model"]
    if not name:
        raise UserError(f"{folder}: does not name its base model; pass --base")
    refuse_target(to, overwrite=overwrite, sources=[folder, name], option="--out")
    revision = None if base else content["revision"]
    known: Any = content["model_dtype"] if content["model_dtype"] in DTYPES else "auto"
    spec = ModelSpec(name=name, revision=revision, dtype=known)
    model = load_model(spec, "--base")
    apply_delta(model, folder)
    tokenizer = load_tokenizer(spec, "--base")
    return export_checked(model, tokenizer, to, cast, verify=verify, max_shard_size=max_shard_size)


def differing(old: Tensor, new: Tensor) -> Tensor:
    """Return the flat positions whose bits differ; -0 and 0 do."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    bits = (tensor.contiguous().flatten().view(words) for tensor in (old, new))
    left, right = bits
    return (left != right).nonzero().flatten()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        missing = sorted(ENTRIES - content.keys())
        if missing or not isinstance(content["shapes"], dict):
            raise ValueError(f"{CONTENT} lacks {', '.join(missing) or 'shapes'}")
    except (OSError, SafetensorError, AttributeError, ValueError) as error:
        raise UserError(f"{folder}: is no whole delta ({error}); write it again") from error
    if content["format"] != FORMAT:
        raise UserError(f"{folder / CONTENT}: has format {content['format']}, not {FORMAT}")
    return content, tensors


def _fits(indices: Tensor, values: Tensor, size: int) -> bool:
    """Tell whether positions and values are of one length, and inside a tensor of a size."""
    if indices.shape != values.shape or indices.ndim != 1:
        return False
    if indices.dtype not in (torch.int32, torch.int64):
        return False
    return not len(indices) or (int(indices.min()) >= 0 and int(indices.max()) < size)


def _check_sha(
    own: Mapping[str, Tensor], content: dict[str, Any], key: str, otherwise: str
) -> None:
    names: Iterable[str] = content["shapes"]
    if weights_sha((name, own[name]) for name in names) != content[key]:
        raise UserError(otherwise)
