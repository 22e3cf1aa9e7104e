"""Count what autograd keeps between forward and backward, and which modules keep it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from allocations import storages
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class _Kept:
    """A tensor that a graph keeps; gone when the graph lets it go."""

    def __init__(self, tensor: Tensor, keeper: str) -> None:
        self.tensor, self.keeper = tensor.detach(), keeper  # detached: no cycle through its graph


def saved_bytes(model: nn.Module, batch: dict[str, Tensor], held: Iterable[Tensor]) -> Counter[str]:
    """Return the bytes kept for backward by the class of the module that kept them first.

    Args:
        model: run forward once; what its graph still keeps at the end counts.
        batch: its arguments.
        held: tensors that live on anyway; their storages do not count.
    """
    known = {storage.data_ptr() for tensor in held for storage in storages(tensor)}
    packed: list[weakref.ref[_Kept]] = []
    inside: list[str] = []

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor, inside[-1] if inside else "loss")
        packed.append(weakref.ref(kept))
        return kept

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(type(module).__name__)

    def leave(*_: Any) -> None:
        inside.pop()

    # hooks on all modules, not on each: a layer with hooks of its own would not be written to
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            loss = model(**batch).loss
    finally:
        for hook in hooks:
            hook.remove()
    found: Counter[str] = Counter()
    for kept in filter(None, (reference() for reference in packed)):
        for storage in storages(kept.tensor):
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found[kept.keeper] += storage.nbytes()
    del loss
    return found
