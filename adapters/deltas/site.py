"""Where one adapter of one layer lies: what backward and gradient taps read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from sft.adapters.region import Positions
from sft.kernels.pattern import Pattern
from sft.kernels.sparse_linear import Tap

if TYPE_CHECKING:
    from sft.adapters.layer import SparseLayer


class DeltaSite:
    """The support of one adapter as a `Pattern`, its gradient tap, and a stamp of its content.

    Args:
        layer: the layer.
        indices: its supports by adapter; they are read anew when they were replaced or written to.
        name: the adapter.
        saved_inputs: in which form backward's inputs are kept; see `sft.kernels.kept`.
    """

    def __init__(
        self, layer: SparseLayer, indices: BufferDict, name: str, *, saved_inputs: str = "full"
    ) -> None:
        self.tap: Tap | None = None
        self.saved_inputs = saved_inputs
        self._layer = layer
        self._indices = indices
        self._name = name
        self._pattern: Pattern | None = None
        self._region: Positions | None = None
        self._version = -1

    @property
    def pattern(self) -> Pattern:
        """The support; its CSR view is kept until the indices change."""
        self._renew()
        assert self._pattern is not None
        return self._pattern

    @property
    def region(self) -> Positions:
        """The support as a region: the same object until the indices change."""
        self._renew()
        assert self._region is not None
        return self._region

    @property
    def stamp(self) -> object:
        """Equal stamps mean that W and the support are the same."""
        return (self._layer.content, self.pattern)

    def _renew(self) -> None:
        indices: Tensor = self._indices[self._name]
        known = self._pattern is not None and self._pattern.indices is indices
        # a version read in a compiled graph is data; what writes to indices settles the layer after
        if torch.compiler.is_compiling() and known:
            return
        if not known or self._version != indices._version:
            self._pattern = Pattern(indices, self._layer.shape)
            self._region = Positions(indices)
            self._version = indices._version
