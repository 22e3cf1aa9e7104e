"""Count what a kernel reads and writes under the interpreter, and catch stray and double stores."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

SECTOR = 32  # bytes: the least that moves


class Traffic:
    """What was read and written.

    Args:
        tensors: all that a kernel may touch; without any, bounds are not checked.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.useful: collections.Counter[str] = collections.Counter()
        self.products = 0
        self._sectors: dict[str, list[Any]] = collections.defaultdict(list)
        self._stored: list[Any] = []
        self._ranges: list[tuple[int, int]] = []
        self.allow(*tensors)

    def allow(self, *tensors: Tensor) -> None:
        """Let a kernel touch these as well."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        """Take note of one access of a program."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        where, wanted = np.broadcast_arrays(pointers.data, mask.data)
        where = where[wanted].ravel().astype(np.uint64)
        if not where.size:
            return
        self._check(kind, where, size)
        self.useful[kind] += where.size * size
        self._sectors[kind].append(np.unique(where // SECTOR))
        if kind == "store":
            self._stored.append(where)

    def _check(self, kind: str, where: Any, size: int) -> None:
        if not self._ranges:
            return
        inside = np.zeros(where.shape, bool)
        for start, stop in self._ranges:
            inside |= (where >= start) & (where + np.uint64(size) <= stop)
        if not inside.all():
            raise IndexError(f"{kind}: {int((~inside).sum())} of {where.size} lanes out of bounds")

    def sectors(self, kind: str) -> int:
        """Return the bytes of whole sectors that each access moves: what caches see."""
        return SECTOR * sum(len(found) for found in self._sectors[kind])

    def distinct(self, kind: str) -> int:
        """Return the bytes of distinct sectors: a floor for memory."""
        found = self._sectors[kind]
        return SECTOR * len(np.unique(np.concatenate(found))) if found else 0

    def stored_twice(self) -> int:
        """Return how many addresses were stored to more than once."""
        where = np.concatenate([np.zeros(0, np.uint64), *self._stored])
        return int(where.size - np.unique(where).size)


@contextlib.contextmanager
def measured(*tensors: Tensor) -> Iterator[Traffic]:
    """Count the traffic of kernels that run inside, under `interpreted()`."""
    traffic = Traffic(*tensors)
    shipped = {
        name: getattr(InterpreterBuilder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_dot",
        )
    }

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.touch("load", pointers, mask)
        return shipped["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.touch("store", pointers, mask)
        return shipped["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.touch("atomic", pointers, mask)
        return shipped["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        traffic.products += a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return shipped["create_dot"](self, a, b, *rest)

    replaced = zip(shipped, (load, store, atomic, dot), strict=True)
    with contextlib.ExitStack() as stack:
        for name, new in replaced:
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, new))
        yield traffic
