"""Where one adapter of one layer lies: what backward and gradient taps read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sft.kernels.pattern import Pattern
from sft.kernels.sparse_linear import Tap

if TYPE_CHECKING:
    from sft.adapters.delta_layer import DeltaLayer


class DeltaSite:
    """The support of one adapter as a `Pattern`, its gradient tap, and a stamp of its content.

    Args:
        layer: the layer.
        name: the adapter.
    """

    def __init__(self, layer: DeltaLayer, name: str) -> None:
        self.tap: Tap | None = None
        self._layer = layer
        self._name = name
        self._pattern: Pattern | None = None
        self._version = -1

    @property
    def pattern(self) -> Pattern:
        """The support; its CSR view is kept until the indices change."""
        indices: Tensor = self._layer.delta_indices[self._name]
        stale = self._pattern is None or self._pattern.indices is not indices
        if stale or self._version != indices._version:
            self._pattern = Pattern(indices, self._layer.shape)
            self._version = indices._version
        assert self._pattern is not None
        return self._pattern

    @property
    def stamp(self) -> object:
        """Equal stamps mean that W and the support are the same."""
        return (self._layer.content, self.pattern)
