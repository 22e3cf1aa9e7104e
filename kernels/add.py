"""Add to matrices at flat positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.library import define


def add_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Add in place, past autograd's version counter: weight.flat[indices[j]] += values[j].

    The sum is taken in float32 or wider and rounded once.

    Args:
        weight: contiguous, any shape, floating.
        indices: (k,) int32 or int64, ascending and unique, each in [0, weight.numel()).
        values: (k,) floating.

    Raises:
        ValueError: positions are not ascending and unique. Of two values for one position a GPU
            would lose one; the check waits for it.
    """
    add_many_([weight], [indices], [values])


def add_many_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    checked: bool = False,
) -> None:
    """Do what `add_` does with each triple; on a GPU in one launch.

    Args:
        weights: as for `add_`.
        indices: one for each weight.
        values: one for each weight.
        checked: the positions are known to be ascending and unique.

    Raises:
        ValueError: see `add_`.
    """
    for at in () if checked else indices:
        if not bool((at[1:] > at[:-1]).all()):
            raise ValueError(
                "indices: got positions out of order or twice, allowed are ascending ones; "
                "sort them, and add up the values of one position first"
            )
    _add_many_([w.data for w in weights], list(indices), [v.detach() for v in values])


def add_reference(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Oracle of `add_`: one entry after another, in float64."""
    flat = weight.data.view(-1)
    for position, value in zip(indices.tolist(), values, strict=True):
        flat[position] = (flat[position].double() + value.double()).to(weight.dtype)


def _plain(weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, at, new in zip(weights, indices, values, strict=True):
        flat = weight.view(-1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        if new.dtype == weight.dtype:  # one rounding, as below
            flat.index_add_(0, at, new)
        else:
            sums = flat.index_select(0, at).to(wide) + new
            flat.index_copy_(0, at.long(), sums.to(weight.dtype))


_add_many_ = define(
    "add_many_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values) -> ()",
    plain=_plain,
    triton="positions:add_many_",
    fake=lambda *_: None,
)
