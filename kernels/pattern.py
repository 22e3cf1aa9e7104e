"""`Pattern`: the positions of a matrix that an operation reads or writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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

    The CSR row pointers and columns are computed on first use and kept (4 bytes an entry); a
    compiled graph keeps nothing, and computes what was not there when it was compiled.
    """

    indices: Tensor
    shape: tuple[int, int]
    _views: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.indices.numel()

    @property
    def density(self) -> float:
        """Share of the matrix that the pattern covers."""
        return len(self) / max(1, self.shape[0] * self.shape[1])

    @property
    def row_pointers(self) -> Tensor:
        """CSR row pointers: (rows + 1,), entry r is the number of positions above row r."""
        return self._view("row_pointers", self._find_row_pointers)

    @property
    def columns(self) -> Tensor:
        """CSR column of each position: (k,), the dtype of the row pointers."""
        return self._view("columns", self._find_columns)

    def _view(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        if name in self._views:
            return self._views[name]
        found = find()
        if not torch.compiler.is_compiling():
            self._views[name] = found
        return found

    def _find_row_pointers(self) -> Tensor:
        rows, cols = self.shape
        edges = torch.arange(rows + 1, device=self.indices.device) * cols
        pointers = torch.searchsorted(self.indices.long(), edges)
        return pointers.to(index_dtype(len(self)))

    def _find_columns(self) -> Tensor:
        return (self.indices % self.shape[1]).to(index_dtype(len(self)))

    def rows(self) -> Tensor:
        """Row of each position: (k,) int64, computed anew at each call."""
        return (self.indices // self.shape[1]).long()

    def by_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the CSC view.

        Returns:
            pointers: (cols + 1,) entry c is the number of positions in columns before c.
            rows: (k,) row of each position, column after column, ascending within a column.
            slots: (k,) which position that is.

        All in the dtype of the row pointers, and kept as the CSR view is (8 bytes an entry).
        """
        dtype = index_dtype(len(self))
        slots = self._view("slots", lambda: self.columns.argsort(stable=True).to(dtype))
        rows = self._view("rows", lambda: self.rows()[slots.long()].to(dtype))
        pointers = self._view("column pointers", lambda: self._column_pointers(slots))
        return pointers, rows, slots

    def _column_pointers(self, slots: Tensor) -> Tensor:
        columns = self.columns[slots.long()]
        edges = torch.arange(self.shape[1] + 1, device=columns.device, dtype=columns.dtype)
        return torch.searchsorted(columns, edges).to(columns.dtype)

    def tiles(self, side: int) -> tuple[Tensor, Tensor]:
        """Sort the positions into square tiles of the matrix.

        Returns:
            order: (k,) int32, slots of the positions, tile after tile, ascending within a tile.
            pointers: (tiles + 1,) int32, where each tile begins in `order`; tiles go row by row.

        Kept as the CSR view is (4 bytes an entry).
        """
        tile = self._tile_of(side)
        order = self._view(f"order {side}", lambda: tile().argsort(stable=True).to(torch.int32))
        pointers = self._view(f"pointers {side}", lambda: self._tile_pointers(tile(), side))
        return order, pointers

    def _tile_of(self, side: int) -> Callable[[], Tensor]:
        across = -(-self.shape[1] // side)
        return lambda: self.rows() // side * across + self.indices % self.shape[1] // side

    def _tile_pointers(self, tile: Tensor, side: int) -> Tensor:
        rows, cols = self.shape
        edges = torch.arange(-(-rows // side) * -(-cols // side) + 1, device=tile.device)
        return torch.searchsorted(tile.sort().values, edges).to(torch.int32)

    def between(self, first_row: int, last_row: int) -> Tensor:
        """Positions in rows [first_row, last_row), counted from `first_row`: (j,) int64."""
        cols = self.shape[1]
        edges = torch.tensor([first_row * cols, last_row * cols], device=self.indices.device)
        start, stop = torch.searchsorted(self.indices, edges.to(self.indices.dtype)).tolist()
        return self.indices[start:stop].long() - first_row * cols
