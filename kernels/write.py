"""Assign matrices at flat positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from sft.kernels.compose import compose
from sft.kernels.library import define, implementation


class Home(NamedTuple):
    """Where trained values live: weight.flat[indices[j]] holds originals[j] + values[j], rounded.

    Args:
        weight: contiguous, any shape.
        indices: (k,) int32 or int64, ascending and unique.
        originals: (k,) in the dtype of the weight.
        reference: round the values before adding, see `compose`.
    """

    weight: Tensor
    indices: Tensor
    originals: Tensor
    reference: bool = False


def write_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Assign in place, past autograd's version counter: weight.flat[indices[j]] = values[j].

    An assignment, never an increment: what is written can be written back bit for bit. The caller
    guards graphs that are still alive (see `sparse_linear`).

    Args:
        weight: contiguous, any shape.
        indices: (k,) int32 or int64, unique, each in [0, weight.numel()).
        values: (k,) in the dtype of `weight`; a silent cast could hide a rounding, so none is made.

    Raises:
        ValueError: `values` has another dtype than `weight`.
    """
    _check(weight, values)
    # .data: autograd's own counter would also refuse a graph whose values are back in place
    weight.data.view(-1).index_copy_(0, indices.long(), values.detach())


def write_many_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Do what `write_` does with each triple; on a GPU in one launch.

    Args:
        weights: as for `write_`.
        indices: one for each weight.
        values: one for each weight, in its dtype.

    Raises:
        ValueError: a value has another dtype than its weight.
    """
    for weight, new in zip(weights, values, strict=True):
        _check(weight, new)
    _write_many_([w.data for w in weights], list(indices), [v.detach() for v in values], [], False)


def write_homes_(homes: Sequence[Home], values: Sequence[Tensor]) -> None:
    """Bring values home: write `compose` of originals and values, as `write_` does.

    On a GPU one launch adds, rounds and writes for all of them.

    Args:
        homes: where the values live.
        values: (k,) floating, one for each home.
    """
    for reference in (False, True):
        some = [p for p in zip(homes, values, strict=True) if p[0].reference == reference]
        if some:
            # no one traces what follows an update, and long lists cost an op time on a CPU
            plain = implementation(some[0][1].device) == "torch"
            run: Callable[..., None] = write_each_ if plain else _write_many_
            run(
                [home.weight.data for home, _ in some],
                [home.indices for home, _ in some],
                [new.detach() for _, new in some],
                [home.originals for home, _ in some],
                reference,
            )


def write_reference(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Oracle of `write_`: one entry after another."""
    flat = weight.data.view(-1)
    for position, value in zip(indices.tolist(), values, strict=True):
        flat[position] = value


def _check(weight: Tensor, values: Tensor) -> None:
    if values.dtype != weight.dtype:
        raise ValueError(f"values: got {values.dtype}, the weight is {weight.dtype}; cast first")


def write_each_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    originals: Sequence[Tensor],
    reference: bool,
) -> None:
    """Do what `write_many_` and, with originals, `write_homes_` do in torch."""
    for i, (weight, at, new) in enumerate(zip(weights, indices, values, strict=True)):
        # in turn, while it is in the cache
        final = compose(originals[i], new, reference=reference) if originals else new
        write_(weight, at, final)


_write_many_ = define(
    "write_many_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, Tensor[] originals, "
    "bool reference) -> ()",
    plain=write_each_,
    triton="positions:write_many_",
    fake=lambda *_: None,
)
