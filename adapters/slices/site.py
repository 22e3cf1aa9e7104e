"""Where one adapter's slice of one layer lies: what backward and resident mode read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sft.adapters.region import Region
from sft.adapters.shapes import has_content

if TYPE_CHECKING:
    from sft.adapters.slices.layer import SliceLinear


class SliceSite:
    """The features of one adapter in one layer, in the order in which the base lies now.

    Args:
        layer: the layer.
        name: the adapter.
        saved_inputs: in which form backward's inputs are kept; see `sft.kernels.kept`.
    """

    def __init__(self, layer: SliceLinear, name: str, saved_inputs: str = "full") -> None:
        self.saved_inputs = saved_inputs
        self._layer = layer
        self._name = name
        self._key: tuple[Tensor, int, Tensor | None] | None = None
        self._region: Region | None = None
        self._indices: Tensor | None = None
        self._start: int | None = None

    @property
    def side(self) -> str:
        """'in' or 'out'."""
        return self._layer.side

    @property
    def indices(self) -> Tensor:
        """(s,) the trained features."""
        self._renew()
        assert self._indices is not None
        return self._indices

    @property
    def start(self) -> int | None:
        """The first feature of a run without a gap, else None."""
        self._renew()
        return self._start

    @property
    def region(self) -> Region:
        """The trained lines of W: the same object until they change place."""
        self._renew()
        assert self._region is not None
        return self._region

    @property
    def stamp(self) -> object:
        """Equal stamps mean that W and the slice are the same."""
        return (self._layer.content, self.region)

    def _renew(self) -> None:
        own: Tensor = self._layer.s2ft_indices[self._name]
        places = self._layer.permuted.places(self._name, self._layer.path)
        if self._is_known(own, places):
            return
        indices = own if places is None else places.to(own.device)[own.long()]
        self._indices, self._region = indices, self._layer.lines(indices)
        self._key = (own, own._version, places)
        self._start = _run(indices)

    def _is_known(self, own: Tensor, places: Tensor | None) -> bool:
        key = self._key
        if key is None or key[0] is not own or key[2] is not places:
            return False
        # a version read in a compiled graph is data; what writes to indices settles the layer after
        return torch.compiler.is_compiling() or key[1] == own._version


def _run(indices: Tensor) -> int | None:
    """Return the first index if each other one is the next after the one before it."""
    if not has_content(indices) or indices.numel() == 0:
        return None  # of what has no content, the general case
    whole = bool((indices[1:] == indices[:-1] + 1).all())
    return int(indices[0]) if whole else None
