"""A gradient as all ranks see it: the mean over their backward passes, row block by row block."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import Tensor

from sft.adapters.ranks import Ranks
from sft.kernels.outer import Outer
from sft.kernels.pattern import Pattern


@dataclass(frozen=True)
class MeanOuter:
    """The mean of one matrix's gradient over the ranks; every read is a collective.

    Ranks whose gradients are means over their part of a batch have as their mean that of the batch.

    Args:
        outer: what this rank's backward pass gave.
        ranks: all of them read the same blocks in the same order.
    """

    outer: Outer
    ranks: Ranks

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.outer.shape

    def at(self, pattern: Pattern) -> Tensor:
        """Return the mean at the positions of `pattern`."""
        return self.ranks.mean(self.outer.at(pattern))

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the mean."""
        return self.ranks.mean(self.outer.block(start, stop))


def shared(outer: Outer, ranks: Ranks, name: str) -> Outer:
    """Return the gradient as all ranks see it; with one rank, the very one.

    Args:
        outer: of this rank's backward pass.
        ranks: the processes that train together.
        name: the module, which must be the same on all ranks.

    Raises:
        RuntimeError: the ranks' backward passes are at different modules, as where a router sends
            their tokens to different ones.
    """
    if ranks.count == 1:
        return outer
    ranks.check_alike(f"gradient of {name}", zlib.crc32(name.encode()))
    return MeanOuter(outer, ranks)
