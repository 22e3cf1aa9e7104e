"""The gradient of a weight as a product not yet multiplied out: what growth and scores read."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sft.kernels.cpu.turn import turn
from sft.kernels.kept import Kept, keep, pass_over, restore
from sft.kernels.outer_at import outer_at, wide_product, widen
from sft.kernels.pattern import Pattern


class Outer(Protocol):
    """A (rows, cols) gradient that is cheap to read at positions and by row blocks."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the stored weight."""

    def at(self, pattern: Pattern) -> Tensor:
        """Return the gradient at the positions of `pattern`: (k,) float32 or wider."""

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) densely: (stop - start, cols) float32 or wider."""


@dataclass(frozen=True)
class DenseOuter:
    """left^T right: the weight gradient of a linear layer.

    Args:
        left: (tokens, rows).
        right: (tokens, cols).
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.left.shape[1], self.right.shape[1]

    def at(self, pattern: Pattern) -> Tensor:
        """Return the product at the positions of `pattern`."""
        return outer_at(self.left, self.right, pattern)

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the product."""
        return wide_product(self.left[:, start:stop], self.right)


@dataclass(frozen=True)
class LookupOuter:
    """onehot(ids)^T grad: the weight gradient of an embedding, never larger than tokens x cols.

    Args:
        ids: (tokens,) int64 row of each token.
        grad: (tokens, cols) gradient of the looked-up rows.
        num_rows: rows of the embedding.
    """

    ids: Tensor
    grad: Tensor
    num_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.num_rows, self.grad.shape[1]

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Distinct rows (u,), ascending, and the gradient summed per row (u, cols)."""
        rows, slot = torch.unique(self.ids, return_inverse=True)
        grad = widen(self.grad)
        return rows, grad.new_zeros(rows.numel(), grad.shape[1]).index_add_(0, slot, grad)

    def at(self, pattern: Pattern) -> Tensor:
        """Return the gradient at the positions of `pattern`; rows never looked up give 0."""
        rows, sums = self._sums
        if rows.numel() == 0:
            return sums.new_zeros(len(pattern))
        wanted = pattern.rows()
        slot = torch.searchsorted(rows, wanted).clamp_(max=rows.numel() - 1)
        values = sums[slot, pattern.columns.long()]
        return torch.where(rows[slot] == wanted, values, values.new_zeros(()))

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) densely."""
        rows, sums = self._sums
        inside = (rows >= start) & (rows < stop)
        dense = sums.new_zeros(stop - start, sums.shape[1])
        return dense.index_copy_(0, rows[inside] - start, sums[inside])


def token_last(tensor: Tensor) -> Tensor:
    """Return a (tokens, n) tensor whose tokens lie side by side in memory, as dot products want.

    On the CPU in the dtype that sums are taken in. Elsewhere in its own, and each of the n rows
    starts at a boundary of 128 bits, whatever the number of tokens.
    """
    if tensor.device.type == "cpu":
        wide = widen(tensor)
        return wide if wide.stride(0) == 1 else turn(wide).t()
    return aligned_tokens(tensor)


def aligned_tokens(tensor: Tensor) -> Tensor:
    """Return a (tokens, n) tensor as (n, tokens) lies in memory, rows padded to 16 entries."""
    tokens, n = tensor.shape
    rows = tensor.new_empty(n, -(-tokens // 16) * 16)[:, :tokens]
    return rows.copy_(tensor.t()).t()


class SharedInput:
    """One compressed copy and one transposition for all that read one input: q, k, v; gate and up.

    Each reader announces itself in forward and takes the input in backward; the transposed copy
    lives from the first of them to the last. What is kept for backward is made for the first one,
    and forgotten here when the input is gone: from then on the readers alone hold it.
    """

    def __init__(self) -> None:
        self._readers = 0
        self._transposed: Tensor | None = None
        self._kept: dict[str, Kept] = {}
        self._input: weakref.ref[Tensor] | None = None

    def announce(self) -> None:
        """Count one more reader."""
        self._readers += 1

    def follow(self, x: Tensor) -> None:
        """Share what is kept for as long as x lives."""
        kept = self._kept

        def forget(_: object) -> None:
            kept.clear()

        self._input = weakref.ref(x, forget)

    def close(self) -> None:
        """Forget what is kept: no more readers come."""
        self._kept.clear()

    def keep(self, x: Tensor, form: str) -> Kept:
        """Return x as backward is to find it; see `sft.kernels.kept`."""
        if form == "full" or self._input is None:
            return keep(x, form)
        if form in self._kept:
            pass_over()
        else:
            self._kept[form] = keep(x, form)
        return self._kept[form]

    def take(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """Return what `keep` gave for (..., n) as (tokens, n), the tokens side by side."""
        transposed = self._transposed
        if transposed is None:
            x = restore(kept, torch.promote_types(dtype, torch.float32))
            transposed = token_last(x.reshape(-1, x.shape[-1]))
        self._readers -= 1
        self._transposed = transposed if self._readers > 0 else None
        return transposed


_Latest = tuple["weakref.ref[Tensor]", int, torch.dtype, "weakref.ref[SharedInput]"]
_latest: _Latest | None = None


def shared_input(x: Tensor, dtype: torch.dtype) -> SharedInput:
    """Return what the readers of this very tensor share; readers follow one another in forward.

    Args:
        x: the input; the same object, unchanged since, is the same input.
        dtype: what the readers compute in.
    """
    global _latest
    if _latest is not None:
        known, version, kind, found = _latest
        shared = found()
        same = known() is x and version == x._version and kind == dtype
        if same and shared is not None:
            return shared
        if shared is not None:
            # checkpoints keep inputs of blocks alive, but nothing that was kept of them
            shared.close()
    shared = SharedInput()
    shared.follow(x)
    _latest = (weakref.ref(x), x._version, dtype, weakref.ref(shared))
    return shared
