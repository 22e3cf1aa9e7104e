"""Exact undo of writes into a weight: the originals, last written first."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sft.kernels.write import write_


class MergeStack:
    """Remembers the originals under each merged adapter."""

    def __init__(self) -> None:
        self._stack: list[tuple[Tensor, Tensor]] = []

    def push(self, indices: Tensor, originals: Tensor) -> None:
        """Remember (k,) originals at (k,) positions; the positions are copied."""
        self._stack.append((indices.clone(), originals))

    def undo(self, weight: Tensor) -> None:
        """Write all originals back, the last merged first."""
        while self._stack:
            indices, originals = self._stack.pop()
            write_(weight, indices, originals)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast along with the layer."""
        self._stack = [(fn(indices), fn(originals)) for indices, originals in self._stack]
