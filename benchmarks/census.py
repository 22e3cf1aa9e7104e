"""Find every tensor that a model and its optimizer hold, and say what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from allocations import storages
from torch import Tensor, nn

KINDS = ("frozen", "trained", "indices", "originals", "optimizer", "gradients")
# objects of other packages are not looked into: they hold no tensors of a method
_LOOKED_INTO = ("sft.", "peft.", "torch.nn.", "transformers.models.")


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Return the bytes held between two steps, each storage once, by kind.

    Frozen are the base model's weights; indices are whatever whole numbers a method keeps, its
    views of a sparse pattern included; originals are floats it keeps beside parameters, such as
    weights to put back; gradients are as large as what is trained, whether held now or not.
    """
    kinds = {id(p): "trained" if p.requires_grad else "frozen" for p in model.parameters()}
    kinds |= {id(b): "frozen" for b in model.buffers() if b.is_floating_point()}
    state = {} if optimizer is None else optimizer.state
    kinds |= {id(t): "optimizer" for t in _tensors(list(state.values()), set())}
    found = dict.fromkeys(KINDS, 0)
    known: set[int] = set()
    # parameters first: a view of one is no further tensor
    ordered = [*model.parameters(), *model.buffers(), *reachable(model, optimizer)]
    for tensor in ordered:
        for storage in storages(tensor):
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                other = "originals" if tensor.is_floating_point() else "indices"
                found[kinds.get(id(tensor), other)] += storage.nbytes()
    trained = [p for p in model.parameters() if p.requires_grad]
    found["gradients"] = sum(p.numel() * p.element_size() for p in trained)
    return found


def reachable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """Yield every tensor that the attributes of the two lead to."""
    seen: set[int] = set()
    yield from _tensors(model, seen)
    if optimizer is not None:
        yield from _tensors([list(optimizer.state.values()), vars(optimizer)], seen)


def _tensors(root: Any, seen: set[int]) -> Iterator[Tensor]:
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif type(value).__module__.startswith(_LOOKED_INTO) and not isinstance(value, type):
            waiting += getattr(value, "__dict__", {}).values()
