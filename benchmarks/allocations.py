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


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that were alive at once of what `run` allocated; it runs twice.

    The first run is not counted: it imports, and allocates what stays.
    """
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


class _Counter(TorchDispatchMode):
    """Adds up storages from their first tensor to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if _is_plain(tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + tracemalloc.get_traced_memory()[0])
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse
