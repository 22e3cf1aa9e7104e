"""Resident weights: the effective weight lives in W while training, and leaves it bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sft.adapters.region import Region
from sft.kernels.compose import compose

Key = tuple[str, int, int]

_STOCK_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward)


class Residence(NamedTuple):
    """What W holds for an adapter: w0 + values in the region.

    The region is the same object for as long as it is the same place.
    """

    region: Region
    values: Tensor


class Residency:
    """Writes one adapter's effective weight into a layer's W and restores the originals exactly.

    W holds w0 + delta in the adapter's region while a key is set; the originals are stashed. Every
    write is an assignment from the stash and the fp32 values, so nothing drifts.

    Args:
        weight: returns W. It must come along when the layer is copied: a bound method does.
        reference: round as SpIEL's authors do (see `compose`).
    """

    def __init__(self, weight: Callable[[], Tensor], *, reference: bool = False) -> None:
        self.enabled = False
        self.key: Key | None = None
        self._weight = weight
        self._reference = reference
        self._forced = 0
        self._region: Region | None = None
        self._stash: Tensor | None = None

    def write(self, name: str, residence: Residence) -> None:
        """Bring W to the effective weight of this adapter; nothing to do when it is there."""
        region, values = residence
        key = (name, values._version, self._forced)
        if key == self.key and region is self._region:
            return
        if self._region is not region or self.key is None:
            self.restore()
            self._region, self._stash = region, region.read(self._weight())
        assert self._stash is not None
        region.write(
            self._weight(), compose(self._stash, values.detach(), reference=self._reference)
        )
        self.key = key

    def restore(self) -> None:
        """Write the originals back; W is then the pre-trained weight, bit for bit."""
        if self._region is not None and self._stash is not None:
            self._region.write(self._weight(), self._stash)
        self.key = self._region = self._stash = None

    def invalidate(self) -> None:
        """Make the next write happen even if the values' version counter did not move."""
        self._forced += 1


def obstacle(base: nn.Module) -> str | None:
    """Return why the weight of `base` can't hold the effective weight, or None if it can."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__} (quantised or sharded)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype} (quantised)"
    if weight.is_meta:
        return "its weight is on the meta device"
    if not weight.is_contiguous():
        return "its weight is not contiguous"
    if getattr(type(base), "forward", None) not in _STOCK_FORWARDS:
        return f"{type(base).__name__} has a forward of its own"
    if "forward" in vars(base):
        return "its forward was replaced"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return "it carries hooks"
    if getattr(base, "max_norm", None) is not None:
        return "max_norm rescales its rows in forward"
    return None
