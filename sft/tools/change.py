"""What an adapter changes of one weight: positions and differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sft.adapters.geometry import Kind, stored_weight
from sft.adapters.layer import SparseLayer
from sft.adapters.region import Positions, Region, Whole
from sft.errors import UserError

# A dense difference of which less is not 0 is kept by positions.
_SPARSE_BELOW = 0.5


@dataclass(frozen=True)
class Change:
    """A difference of one weight.

    Args:
        shape: of the weight as it is stored.
        values: (k,) float32 or wider.
        indices: (k,) int64, ascending flat positions; None where all of the weight is changed.
        trained: number of trained values behind it.
        rank: of the low-rank product that it is, if any.
    """

    shape: tuple[int, ...]
    values: Tensor
    indices: Tensor | None
    trained: int
    rank: int | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def density(self) -> float:
        """Share of the weights that are reached."""
        return self.values.numel() / self.numel if self.numel else 0.0

    @property
    def support(self) -> Tensor:
        """Positions that are reached: (k,) int64."""
        return torch.arange(self.numel) if self.indices is None else self.indices

    def dense(self) -> Tensor:
        """Return the difference in the shape of the weight."""
        if self.indices is None:
            return self.values.view(self.shape)
        return (
            self.values.new_zeros(self.numel)
            .scatter_(0, self.indices, self.values)
            .view(self.shape)
        )


def change_of(layer: Any, adapter: str) -> Change:
    """Return what an adapter changes of a layer's weight.

    Args:
        layer: of ours, or of stock PEFT's; not resident.
        adapter: its name.

    Raises:
        UserError: the adapter adds no difference to a weight.
    """
    trained = _trained(layer, adapter)
    if not isinstance(layer, SparseLayer):
        if not hasattr(layer, "get_delta_weight"):
            raise UserError(
                f"adapter: a {type(layer).__name__} adds no difference to a weight; tools read "
                "methods that can be merged by addition"
            )
        rank = getattr(layer, "r", None)
        rank = rank.get(adapter) if isinstance(rank, dict) else None
        return from_dense(layer.get_delta_weight(adapter), trained=trained, rank=rank)
    region = layer.merge_region(adapter)
    if isinstance(region, Whole):
        factors = layer.low_rank(adapter)
        rank = None if factors is None else len(factors[0])
        return _whole(layer.get_delta_weight(adapter), trained, rank)
    residence = layer.residence(adapter)
    assert residence is not None
    shape = _stored_shape(layer)
    places = flat_positions(region, shape)
    return _sorted(shape, places, residence.values.detach().flatten(), trained)


def from_dense(delta: Tensor, *, trained: int | None = None, rank: int | None = None) -> Change:
    """Return a difference given as a whole matrix, by positions where few of them are not 0."""
    whole = _whole(delta, delta.numel() if trained is None else trained, rank)
    indices = whole.values.nonzero().flatten()
    if len(indices) >= _SPARSE_BELOW * whole.numel:
        return whole
    return replace(whole, values=whole.values[indices], indices=indices)


def flat_positions(region: Region, shape: tuple[int, ...]) -> Tensor:
    """Return the flat positions of a region, in the order of its values: (k,) int64."""
    if isinstance(region, Positions):
        return region.indices.long().cpu()
    everywhere = torch.arange(torch.Size(shape).numel()).view(shape)
    return region.mapped(Tensor.cpu).read(everywhere).flatten()


def wide(values: Tensor) -> Tensor:
    """Return values on the CPU, in float32 or wider."""
    return values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))


def _whole(delta: Tensor, trained: int, rank: int | None) -> Change:
    return Change(tuple(delta.shape), wide(delta).flatten(), None, trained, rank)


def _sorted(shape: tuple[int, ...], places: Tensor, values: Tensor, trained: int) -> Change:
    order = places.argsort()
    return Change(shape, wide(values)[order], places[order], trained)


def _stored_shape(layer: SparseLayer) -> tuple[int, ...]:
    if layer.kind is Kind.EXPERTS:
        return tuple(stored_weight(layer.get_base_layer()).shape)
    return layer.shape


def _trained(layer: Any, adapter: str) -> int:
    """Count an adapter's trained values in a layer."""
    held: list[Any] = [getattr(layer, part, {}) for part in layer.adapter_layer_names]
    found = [part[adapter] for part in held if adapter in part]
    return sum(
        tensor.numel()
        for part in found
        for tensor in ([part] if isinstance(part, Tensor) else part.parameters())
    )
