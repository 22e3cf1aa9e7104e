"""`Pattern`: the positions of a matrix that an operation reads or writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat positions in `numel` entries: int32 where it suffices."""
    return torch.int32 if numel < 2**31 else torch.int64


@dataclass(frozen=True, eq=False)
class Pattern:
    """Sorted, unique flat positions of a (rows, cols) matrix, with their CSR view.

    Args:
        indices: (k,) int32 or int64, ascending; position = row * cols + col < rows * cols.
        shape: (rows, cols) of the matrix as it is stored.

    The CSR row pointers and columns are computed on first use and kept (4 bytes an entry).
    """

    indices: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.indices.numel()

    @property
    def density(self) -> float:
        """Share of the matrix that the pattern covers."""
        return len(self) / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def row_pointers(self) -> Tensor:
        """CSR row pointers: (rows + 1,), entry r is the number of positions above row r."""
        rows, cols = self.shape
        edges = torch.arange(rows + 1, device=self.indices.device) * cols
        pointers = torch.searchsorted(self.indices.long(), edges)
        return pointers.to(index_dtype(len(self)))

    @cached_property
    def columns(self) -> Tensor:
        """CSR column of each position: (k,), the dtype of the row pointers."""
        return (self.indices % self.shape[1]).to(self.row_pointers.dtype)

    def rows(self) -> Tensor:
        """Row of each position: (k,) int64, computed anew at each call."""
        return (self.indices // self.shape[1]).long()

    def tiles(self, side: int) -> tuple[Tensor, Tensor]:
        """Sort the positions into square tiles of the matrix.

        Returns:
            order: (k,) int32, slots of the positions, tile after tile, ascending within a tile.
            pointers: (tiles + 1,) int32, where each tile begins in `order`; tiles go row by row.

        Kept for the last side asked for (4 bytes an entry).
        """
        if side not in self._tiles:
            self._tiles.clear()
            self._tiles[side] = self._sort_into_tiles(side)
        return self._tiles[side]

    @cached_property
    def _tiles(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def _sort_into_tiles(self, side: int) -> tuple[Tensor, Tensor]:
        rows, cols = self.shape
        across = -(-cols // side)
        tile = self.rows() // side * across + self.columns.long() // side
        tile, order = tile.sort(stable=True)
        edges = torch.arange(-(-rows // side) * across + 1, device=tile.device)
        return order.to(torch.int32), torch.searchsorted(tile, edges).to(torch.int32)

    def between(self, first_row: int, last_row: int) -> Tensor:
        """Positions in rows [first_row, last_row), counted from `first_row`: (j,) int64."""
        cols = self.shape[1]
        edges = torch.tensor([first_row * cols, last_row * cols], device=self.indices.device)
        start, stop = torch.searchsorted(self.indices, edges.to(self.indices.dtype)).tolist()
        return self.indices[start:stop].long() - first_row * cols
