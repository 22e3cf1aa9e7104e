"""Resident weights: the effective weight lives in W while training, and leaves it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from sft.adapters.gathered import OFFLOADED
from sft.adapters.region import Positions, Region
from sft.kernels.compose import compose
from sft.kernels.write import Home, write_homes_

Key = tuple[str, int, int]

# fake tensors stand in for plain ones when a run is planned
_PLAIN = (nn.Parameter, Tensor, FakeTensor)
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
        self._told = False
        self._region: Region | None = None
        self._stash: Tensor | None = None

    def write(self, name: str, residence: Residence) -> None:
        """Bring W to the effective weight of this adapter; nothing to do when it is there."""
        if self.holds(name, residence):
            return
        self.prepare(residence.region)
        assert self._stash is not None
        values = compose(self._stash, residence.values.detach(), reference=self._reference)
        residence.region.write(self._weight(), values)
        self._note(name, residence)

    def settle(self, due: Due | None) -> str | None:
        """Write what is due, or restore; return the adapter that W holds then, or None."""
        if due is None:
            self.restore()
            return None
        self.write(due.name, due.residence)
        if not torch.compiler.is_compiling():
            self._told = False
        return due.name

    def holds(self, name: str, residence: Residence) -> bool:
        """Tell whether W is the effective weight of this adapter, as it is now.

        A compiled graph asks no more than whether W was written: to read a version or a key would
        have it compiled anew after each update. Those who move values settle W right after.
        """
        if torch.compiler.is_compiling() and self._stash is not None:
            return residence.region is self._region
        key = (name, residence.values._version, self._forced)
        return key == self.key and residence.region is self._region

    def prepare(self, region: Region) -> None:
        """Stash what W holds in a region that is about to be written."""
        if self._region is not region or self.key is None:
            self.restore()
            self._region, self._stash = region, region.read(self._weight())

    def home(self, region: Region) -> Home | None:
        """Return where values of this region are to be written, by all layers at once.

        None for another region than W holds, or one that is not of single weights.
        """
        if self._stash is None or region is not self._region or not isinstance(region, Positions):
            return None
        return Home(self._weight(), region.indices, self._stash, self._reference)

    def wrote(self, name: str, residence: Residence) -> None:
        """Take note of values that another has just written to `home`."""
        self._note(name, residence)
        self._told = True

    def _note(self, name: str, residence: Residence) -> None:
        self.key = (name, residence.values._version, self._forced)
        self._told = False

    def restore(self) -> None:
        """Write the originals back; W is then the pre-trained weight, bit for bit."""
        if self._region is not None and self._stash is not None:
            self._region.write(self._weight(), self._stash)
        self.key = self._region = self._stash = None

    def invalidate(self) -> None:
        """Make the next write happen even if the values' version counter did not move.

        Once after `wrote`, the counter is relied on: the optimizer that wrote them raises it. After
        the next forward pass no more: by then, another may have moved them.
        """
        self._forced += not self._told
        self._told = False


class Due(NamedTuple):
    """What W is to hold: an adapter's residence."""

    residency: Residency
    name: str
    residence: Residence


def write_all(due: Iterable[Due]) -> None:
    """Do what `Residency.write` does for many layers; single weights of all of them in one op."""
    waiting: dict[int, tuple[Due, Home]] = {}
    for one in due:
        residency, name, residence = one
        if residency.holds(name, residence):
            continue
        weight = residency._weight().untyped_storage()._cdata
        if weight in waiting:  # of two layers over one weight, the later one writes last
            _write_waiting(waiting)
        residency.prepare(residence.region)
        home = residency.home(residence.region)
        if home is None:
            residency.write(name, residence)
        else:
            waiting[weight] = (one, home)
    _write_waiting(waiting)


def _write_waiting(waiting: dict[int, tuple[Due, Home]]) -> None:
    pairs = list(waiting.values())
    waiting.clear()
    if pairs:
        write_homes_([home for _, home in pairs], [one.residence.values for one, _ in pairs])
    for one, _ in pairs:
        one.residency._note(one.name, one.residence)


def obstacle(base: nn.Module) -> str | None:
    """Return why the weight of `base` can't hold the effective weight, or None if it can."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in _PLAIN:
        return f"its weight is a {type(weight).__name__} (quantised or sharded)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype} (quantised)"
    if weight.is_meta:
        return "its weight is on the meta device"
    if hasattr(weight, OFFLOADED):
        return "its weight is offloaded"
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
