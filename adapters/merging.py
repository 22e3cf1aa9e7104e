"""Exact undo of writes into a weight: the originals, last written first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sft.adapters.region import Region


class MergeStack:
    """Remembers the originals under each merged adapter."""

    def __init__(self) -> None:
        self._stack: list[tuple[Region, Tensor]] = []

    def push(self, region: Region, originals: Tensor) -> None:
        """Remember what the region held; see `own_index`."""
        self._stack.append((region, originals))

    def undo(self, weight: Tensor) -> None:
        """Write all originals back, the last merged first."""
        while self._stack:
            region, originals = self._stack.pop()
            region.write(weight, originals)

    def beneath(self, weight: Tensor) -> Tensor:
        """Return the weight as it was before the first merge: itself, or a copy without them."""
        if not self._stack:
            return weight
        plain = weight.detach().clone()
        for region, originals in reversed(self._stack):
            region.write(plain, originals)
        return plain

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast along with the layer."""
        self._stack = [(region.mapped(fn), fn(originals)) for region, originals in self._stack]


def own_index(indices: Tensor) -> Tensor:
    """Return a copy that no change of the adapter reaches, in the dtype that writing asks for."""
    return indices.to(torch.int64, copy=True)


def check_mergeable(weight: Tensor) -> None:
    """Raise ValueError unless adapters can be written into this weight."""
    if not weight.is_contiguous():
        raise ValueError(
            f"merge: the base weight of shape {tuple(weight.shape)} is not contiguous; "
            "make it so with weight.data = weight.data.contiguous()"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:  # 8-bit floats have scales
        raise ValueError(
            f"merge: the base weight is {weight.dtype} (quantised), merging would round "
            "deltas away; merge with sft.export.quantized.merge_quantized, or load the base in 16 "
            "or 32 bit, then merge"
        )


def announce(weight: Tensor) -> None:
    """Let autograd refuse a backward whose forward saw the weight before this merge or its undo."""
    if not weight.is_inference():
        increment_version(weight)
