"""Parameters and state of which this process holds some rows (FSDP2's DTensors)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor; asked without importing them, which takes a while."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, all of it where nobody shards; no copy."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    held: Tensor = sharded.to_local()
    return held


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous zeros that are placed as a parameter is."""
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format).detach()


def rows_held(tensor: Tensor) -> slice:
    """Return which rows of a tensor this process holds: all, or its part of equal runs of rows.

    Raises:
        ValueError: it is not sharded by rows.
    """
    rows = tensor.shape[0] if tensor.dim() else 1
    side = _sharded_side(tensor)
    if side is None:
        return slice(0, rows)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    run = -(-rows // mesh.size(side))
    start = min(run * mesh.get_local_rank(side), rows)
    return slice(start, min(start + run, rows))


def whole(tensor: Tensor) -> Tensor:
    """Return all rows, on every process; a copy where they lie on several. Collective."""
    if not is_sharded(tensor):
        return tensor
    # what was offloaded to the CPU is gathered on the device that the processes talk by
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    near: Any = tensor.detach().to(mesh.device_type)
    full: Tensor = near.full_tensor()
    return full.to(tensor.device)


@torch.no_grad()
def put_(tensor: Tensor, rows: Tensor) -> None:
    """Write this process's share of whole rows, of the same shape on all processes."""
    if rows.shape != tensor.shape:
        raise ValueError(
            f"rows: got shape {tuple(rows.shape)}, allowed is {tuple(tensor.shape)}: what is "
            "sharded keeps its size"
        )
    local(tensor).copy_(rows[rows_held(tensor)] if tensor.dim() else rows)


def largest_over_ranks_(like: Tensor, tensors: Sequence[Tensor]) -> None:
    """Give every entry the largest value that any process has, in one all-reduce.

    Args:
        like: sharded as what the tensors belong to; nothing happens if it is not.
        tensors: whole, fp32, the same shapes on all processes that hold shards; written.
    """
    side = _sharded_side(like)
    if side is None or not tensors:
        return
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(mesh.device_type)
    most = torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(flat, op=most, group=mesh.get_group(side))
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, found in zip(tensors, parts, strict=True):
        tensor.copy_(found.view_as(tensor))


def _sharded_side(tensor: Tensor) -> int | None:
    """Return the side of the mesh over which rows are spread, or None where all are held."""
    placements: Any = getattr(tensor, "placements", ())
    sides = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not sides:
        return None
    if len(sides) > 1 or not placements[sides[0]].is_shard(0):
        raise ValueError(
            f"params: got a parameter placed as {placements}, allowed are shards of rows; "
            "set tensor and context parallelism aside"
        )
    return sides[0]
