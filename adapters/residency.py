"""Resident weights: the effective weight lives in W while training, and leaves it bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sft.kernels.compose import compose
from sft.kernels.gather import gather
from sft.kernels.write import write_

if TYPE_CHECKING:
    from sft.adapters.delta_layer import DeltaLayer

Key = tuple[str, int, int, int]

_STOCK_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward)


class Residency:
    """Writes one adapter's effective weight into a layer's W and restores the originals exactly.

    W holds w0 + delta at the trained positions while a key is set; the k originals are stashed.
    Every write is an assignment from the stash and the fp32 values, so nothing drifts.

    Args:
        layer: whose base weight it is. A copy of the layer copies this along with it.
        reference: round as SpIEL's authors do (see `compose`).
    """

    def __init__(self, layer: DeltaLayer, *, reference: bool) -> None:
        self.enabled = False
        self.key: Key | None = None
        self._layer = layer
        self._reference = reference
        self._forced = 0
        self._indices: Tensor | None = None
        self._stash: Tensor | None = None

    def _weight(self) -> Tensor:
        weight: Tensor = self._layer.get_base_layer().weight
        return weight

    def write(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Bring W to the effective weight of this adapter; nothing to do when it is there.

        Args:
            name: the adapter.
            indices: (k,) its support.
            values: (k,) its deltas.
        """
        key = (name, values._version, indices._version, self._forced)
        if key == self.key and indices is self._indices:
            return
        if self._indices is not indices or self.key is None or self.key[2] != key[2]:
            self.restore()
            self._indices, self._stash = indices, gather(self._weight(), indices)
        assert self._stash is not None
        effective = compose(self._stash, values.detach(), reference=self._reference)
        write_(self._weight(), indices, effective)
        self.key = key

    def restore(self) -> None:
        """Write the originals back; W is then the pre-trained weight, bit for bit."""
        if self._indices is not None and self._stash is not None:
            write_(self._weight(), self._indices, self._stash)
        self.key = self._indices = self._stash = None

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
