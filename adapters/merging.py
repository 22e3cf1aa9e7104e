"""Exact undo of writes into a weight: the originals, last written first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sft.adapters.region import Region


class MergeStack:
    """Remembers the originals under each merged adapter."""

    def __init__(self) -> None:
        self._stack: list[tuple[Region, Tensor]] = []

    def push(self, region: Region, originals: Tensor) -> None:
        """Remember what the region held; where it lies is copied."""
        self._stack.append((region.mapped(torch.clone), originals))

    def undo(self, weight: Tensor) -> None:
        """Write all originals back, the last merged first."""
        while self._stack:
            region, originals = self._stack.pop()
            region.write(weight, originals)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast along with the layer."""
        self._stack = [(region.mapped(fn), fn(originals)) for region, originals in self._stack]
