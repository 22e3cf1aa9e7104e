"""Notes what operations on fake tensors would take: bytes from birth to end, and arithmetic.

Storages of fake tensors are as large as real ones would be, and live as long. What an operation
takes and gives back by itself is told by a function; see `sft.plan.scratch`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft.plan.timeline import NEVER, Piece, Timeline, Work

Scratch = Callable[[Any, tuple[Any, ...]], int]
Flops = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the life of every storage, and the work of every operation, while it is entered.

    Args:
        scratch: returns the bytes that an operation takes besides its outputs.
        flops: returns the additions and multiplications that an operation makes.
    """

    def __init__(self, scratch: Scratch, flops: Flops) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock = 0
        self.timeline = Timeline()
        # by storage, of packed weights: what an operation unpacks them to
        self.unpacked: dict[int, int] = {}
        # while gradients are made: sums of two, what they add to, and their outputs
        self.backward = False
        self._sums: list[tuple[Piece, Piece]] = []
        self._known: dict[int, Piece] = {}
        self._scratch, self._flops = scratch, flops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func.namespace == "prim":
            return found
        self.clock += 1
        made = 0
        given: set[int] | None = None
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage._cdata in self._known:
                continue
            if given is None:
                given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            if storage._cdata not in given:
                made += self._add(storage, tensor.is_floating_point())
        if made and self.backward and func is torch.ops.aten.add.Tensor:
            self._note_sum(args[0])
        spike = self._scratch(func, args) + self._unpacks(func, args)
        if spike:
            self.timeline.spikes[self.clock] = spike
        if made or func._schema.is_mutable:  # a view moves nothing
            read = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs)))
            self.timeline.work.append(
                Work(self.clock, self._flops(func, args, kwargs, found), read + made)
            )
        return found

    def _note_sum(self, first: Tensor) -> None:
        piece = self._known.get(first.untyped_storage()._cdata)
        if piece is not None and first.is_contiguous():
            self._sums.append((piece, self.timeline.pieces[-1]))

    def join_sums(self) -> None:
        """Let sums of gradients take the place of their first part, where that ends with them.

        Autograd adds up in place what nobody else holds, but not what is no plain tensor.
        """
        for first, total in self._sums:
            if first.died == total.born + 1:
                first.died = total.born
        self._sums.clear()

    def _unpacks(self, func: Any, args: tuple[Any, ...]) -> int:
        if not self.unpacked or func._opname not in ("mm", "addmm"):
            return 0
        return sum(self.unpacked.get(t.untyped_storage()._cdata, 0) for t in _tensors(args))

    def pack(self, tensor: Tensor, size: int, unpacked: int) -> None:
        """Let a tensor count as packed in so many bytes; a product unpacks it."""
        key = tensor.untyped_storage()._cdata
        self._known[key].size = size
        self.unpacked[key] = unpacked

    def _add(self, storage: torch.UntypedStorage, floating: bool) -> int:
        piece = Piece(storage.nbytes(), self.clock, floating)
        self.timeline.pieces.append(piece)
        self._known[storage._cdata] = piece
        weakref.finalize(storage, self._remove, storage._cdata)
        return piece.size

    def _remove(self, key: int) -> None:
        self._known.pop(key).died = self.clock + 1

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            piece = self._known.get(tensor.untyped_storage()._cdata)
            if piece is not None:
                piece.kind = kind

    def alive(self) -> list[Piece]:
        """Return what is alive now."""
        return [piece for piece in self._known.values() if piece.died == NEVER]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
