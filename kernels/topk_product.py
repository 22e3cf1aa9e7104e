"""The largest entries of an outer product row[r] * col[c], without the product."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from sft.kernels.pattern import Pattern
from sft.kernels.topk import top_k_reference


def topk_product(row: Tensor, col: Tensor, k: int, exclude: Pattern) -> Tensor:
    """Return the positions of the k largest positive products outside `exclude`.

    SpIEL-MA's growth rule (arXiv 2401.16405, section 3.3): row and col are SM3's squared-gradient
    accumulators. The authors materialise about 26 bytes per weight; this counts by binary search
    over the sorted columns: O((rows log cols) * 64 + k) time, O(rows + cols + k) memory.

    Args:
        row: (rows,) non-negative float32.
        col: (cols,) non-negative float32.
        k: how many; fewer come back when fewer products are positive.
        exclude: positions that may not be chosen, over the shape (rows, cols).

    Returns:
        (<= k,) int64 ascending; equal products are taken from the lowest position up.
    """
    table = _Products(row.double(), col.double(), exclude)
    k = min(k, table.count(_SMALLEST))
    if k <= 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    threshold = table.kth_largest(k)
    above = table.at_least(_next_up(threshold))
    ties = table.equal_to(threshold, k - above.numel())
    return torch.cat([above, ties]).sort().values


# Smallest positive product of two float32 numbers; divided by any of them it stays a normal double.
_SMALLEST = 2.0**-298


class _Products:
    """Counts and lists of {row[r] * col[c] >= tau}; exact, as float32 products fit float64."""

    def __init__(self, row: Tensor, col: Tensor, exclude: Pattern) -> None:
        self.row, self.col, self.exclude = row, col, exclude
        self.ascending, self.order = col.sort(stable=True)
        taken = row[exclude.rows()] * col[exclude.columns.long()]
        self.taken = taken.sort().values

    def _per_row(self, tau: float) -> Tensor:
        """How many products of each row reach tau > 0: (rows,) int64."""
        # tensor / tensor: a Python scalar would be multiplied by a rounded reciprocal.
        # row 0 gives tau / 0 = inf, which no column reaches.
        needed = self.row.new_tensor(tau) / self.row
        return self.col.numel() - torch.searchsorted(self.ascending, needed)

    def count(self, tau: float) -> int:
        """How many products outside the excluded positions reach tau."""
        # a Python scalar would be compared in float32
        taken = torch.searchsorted(self.taken, self.taken.new_tensor(tau))
        return int(self._per_row(tau).sum()) - self.taken.numel() + int(taken)

    def kth_largest(self, k: int) -> float:
        """The k-th largest product: bisection over the bit patterns of positive doubles."""
        low, high = _bits(_SMALLEST), _bits(float("inf"))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.count(_double(middle)) >= k else (low, middle)
        return _double(low)

    def at_least(self, tau: float) -> Tensor:
        """Positions of the products that reach tau, excluded ones left out."""
        per_row = self._per_row(tau)
        return self._positions(per_row, per_row)

    def equal_to(self, tau: float, wanted: int) -> Tensor:
        """The lowest `wanted` positions whose product is exactly tau, excluded ones left out."""
        per_row = self._per_row(tau)
        ties = per_row - self._per_row(_next_up(tau))
        # there may be rows * cols ties: list as many as suffice if all excluded ones are among them
        left = wanted + len(self.exclude) - (ties.cumsum(0) - ties)
        return self._positions(per_row, ties.minimum(left.clamp(min=0)))[:wanted]

    def _positions(self, reach: Tensor, counts: Tensor) -> Tensor:
        """List the smallest counts[r] of the reach[r] largest columns of each row r."""
        rows = torch.repeat_interleave(counts)
        rank = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        columns = self.order[self.col.numel() - reach[rows] + rank]
        return self._outside(rows * self.col.numel() + columns)

    def _outside(self, positions: Tensor) -> Tensor:
        return positions[~torch.isin(positions, self.exclude.indices.long())]


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _double(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _next_up(value: float) -> float:
    return _double(_bits(value) + 1)


def topk_product_reference(row: Tensor, col: Tensor, k: int, exclude: Pattern) -> Tensor:
    """Oracle of `topk_product`: the dense product and a stable sort."""
    scores = torch.outer(row.double(), col.double()).flatten()
    scores[exclude.indices.long()] = 0.0
    chosen = top_k_reference(scores, k)
    return chosen[scores[chosen] > 0]
