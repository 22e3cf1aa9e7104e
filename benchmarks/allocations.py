"""Count the bytes that live at once while a block runs: torch's by storage, NumPy's by tracemalloc.

What a kernel takes and gives back within one operation is not seen.
"""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], *, warm_up: bool = True) -> int:
    """Return the most bytes that were alive at once of what `run` allocated.

    Args:
        run: runs twice; the first run is not counted: it imports, and allocates what stays.
        warm_up: False if it has run before; then it runs once.
    """
    if warm_up:
        with _Counter():
            run()
    counter = _Counter()
    tracemalloc.start()
    try:
        with counter:
            run()
    finally:
        tracemalloc.stop()
    return counter.peak


def peak_and_largest_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """Return the most bytes of torch's that were alive at once, and those of the largest tensor.

    Args:
        run: allocates what is counted; runs once.
    """
    counter = _Counter()
    with counter:
        run()
    return counter.peak, counter.largest


class _Counter(TorchDispatchMode):
    """Adds up storages from their first tensor to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {s._cdata for t in tree_leaves((args, kwargs)) for s in storages(t)}
        found = func(*args, **(kwargs or {}))
        for storage in (s for leaf in tree_leaves(found) for s in storages(leaf)):
            if storage._cdata not in before:
                self._add(storage)
        self.peak = max(self.peak, self.live + tracemalloc.get_traced_memory()[0])
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def storages(value: Any) -> list[torch.UntypedStorage]:
    """Return the storages under a tensor of the CPU, those of a sparse one's parts included."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return []
    if value.layout is torch.strided:
        return [value.untyped_storage()]
    if value.layout is torch.sparse_coo:
        parts = [value._indices(), value._values()]
    elif value.layout is torch.sparse_csr:
        parts = [value.crow_indices(), value.col_indices(), value.values()]
    else:
        return []
    return [part.untyped_storage() for part in parts]
