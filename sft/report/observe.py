"""How a model's supports and ranks change while it trains, seen from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.layer import SparseLayer, sparse_layers


class Observer:
    """Remembers supports and ranks, and tells what has changed since it was asked last.

    A moved support is a new tensor: the one of before is held by reference, so that a look costs
    nothing until one moves.

    Args:
        model: with adapters of ours, or without.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            f"{_short(name)}{_suffix(layer, adapter)}": (layer, adapter)
            for name, layer in sparse_layers(model).items()
            for adapter in layer.trained_values
        }
        self._supports = {name: self._support(name) for name in self._layers}
        self._ranks: dict[str, int] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """How many positions each support has."""
        return {name: len(support) for name, support in self._supports.items()}

    def moved(self) -> dict[str, int]:
        """Return the number of positions that are new, by module."""
        found = {}
        for name, old in self._supports.items():
            new = self._support(name)
            if new is not old and len(new) and (count := count_new(new, old)):
                found[name] = count
            self._supports[name] = new
        return found

    def changed_ranks(self) -> dict[str, int]:
        """Return the open ranks of each module, or nothing where all are as they were."""
        ranks = {name: layer.open_ranks(adapter) for name, (layer, adapter) in self._layers.items()}
        known = {name: rank for name, rank in ranks.items() if rank is not None}
        changed, self._ranks = known != self._ranks, known
        return known if changed else {}

    def _support(self, name: str) -> Tensor:
        layer, adapter = self._layers[name]
        return layer.support(adapter)


def count_new(new: Tensor, old: Tensor) -> int:
    """Return how many of some distinct positions are not among the others."""
    return int((~torch.isin(new, old.to(new.device), assume_unique=True)).sum())


def _short(name: str) -> str:
    """Return a module's name in the base model."""
    return name.removeprefix("base_model.model.")


def _suffix(layer: SparseLayer, adapter: str) -> str:
    trained: Any = layer.trained_values
    return f".{adapter}" if len(trained) > 1 else ""
