"""Tells an optimizer which weight each trained value lives in, so that it writes both at once."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from sft.adapters.base import SparseTuner
from sft.adapters.geometry import stored_weight
from sft.adapters.layer import SparseLayer, sparse_layers
from sft.adapters.residency import Due
from sft.kernels.write import Home


class ResidentHomes:
    """The weights of a model's sparse layers, while they are resident.

    Args:
        tuner: holds the layers. Values that become parameters later have no home here: they are
            written as ever, by `sync_resident`.
    """

    def __init__(self, tuner: SparseTuner) -> None:
        layers = sparse_layers(tuner).values()
        weights = {layer: id(stored_weight(layer.get_base_layer())) for layer in layers}
        shared = Counter(weights.values())
        self._found: dict[int, Due] = {}
        self._places: dict[int, SparseLayer] = {}
        for layer in layers:
            residences = [layer.residence(adapter) for adapter in layer.trained_values]
            # of two layers over one weight, the later one must write last
            if shared[weights[layer]] == 1:
                self._places |= {id(r.values): layer for r in residences if r is not None}

    def find(self, parameter: Tensor) -> Home | None:
        """Return where a parameter's values live now, or None: they are not written."""
        layer = self._places.get(id(parameter))
        due = None if layer is None else layer.due()
        if due is None or due.residence.values is not parameter:
            return None
        self._found[id(parameter)] = due
        return due.residency.home(due.residence.region)

    def wrote(self, parameter: Tensor) -> None:
        """Let the layer know that W holds the values: it need not write them once more."""
        residency, name, residence = self._found.pop(id(parameter))
        residency.wrote(name, residence)
