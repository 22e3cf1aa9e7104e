"""Changes of one weight, side by side on the positions that any of them reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sft.tools.change import Change


@dataclass(frozen=True)
class Aligned:
    """Several changes of one weight.

    Args:
        shape: of the weight.
        positions: (u,) int64, ascending: what any of them reaches; None where that is all.
        values: (n, u), 0 where a change does not reach.
        present: (n, u) bool, where it reaches.
    """

    shape: tuple[int, ...]
    positions: Tensor | None
    values: Tensor
    present: Tensor

    def weighted(self, weights: Tensor) -> Aligned:
        """Return the changes, each times its weight."""
        scaled = self.values * weights.to(self.values).unsqueeze(1)
        return Aligned(self.shape, self.positions, scaled, self.present)

    def kept(self, where: Tensor) -> Aligned:
        """Return what is left of each change: where (n, u) is true."""
        zero = self.values.new_zeros(())
        values = torch.where(where, self.values, zero)
        return Aligned(self.shape, self.positions, values, self.present & where)


def align(shape: tuple[int, ...], changes: Sequence[Change | None]) -> Aligned:
    """Put changes of one weight side by side.

    Args:
        shape: of the weight.
        changes: of that shape; None reaches nothing.
    """
    held = [change for change in changes if change is not None]
    assert all(change.shape == shape for change in held)
    dtype = torch.float64 if any(c.values.dtype == torch.float64 for c in held) else torch.float32
    positions = _union(held)
    size = torch.Size(shape).numel() if positions is None else len(positions)
    values = torch.zeros(len(changes), size, dtype=dtype)
    present = torch.zeros(len(changes), size, dtype=torch.bool)
    for row, change in enumerate(changes):
        if change is not None:
            where = _places(positions, change)
            values[row, where] = change.values.to(dtype)
            present[row, where] = True
    return Aligned(shape, positions, values, present)


def _union(changes: Sequence[Change]) -> Tensor | None:
    reached = [change.indices for change in changes]
    sparse = [indices for indices in reached if indices is not None]
    if len(sparse) < len(reached):
        return None
    return torch.unique(torch.cat(sparse)) if sparse else torch.empty(0, dtype=torch.int64)


def _places(positions: Tensor | None, change: Change) -> Tensor | slice:
    """Return where the values of a change lie among all positions."""
    if change.indices is None:
        return slice(None)
    return change.indices if positions is None else torch.searchsorted(positions, change.indices)
