"""Read matrices at flat positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sft.kernels.library import define


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of `weight` at flat positions: out[j] = weight.flat[indices[j]].

    Args:
        weight: contiguous, any shape and dtype.
        indices: (k,) int32 or int64, each in [0, weight.numel()).

    Returns:
        (k,) a copy, in the dtype of `weight`.
    """
    return weight.detach().view(-1).index_select(0, indices)


def gather_many(weights: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """Return what `gather` does for each pair; on a GPU in one launch.

    Args:
        weights: as for `gather`.
        indices: one for each weight.

    Raises:
        ValueError: there are more of one than of the other.
    """
    if len(weights) != len(indices):
        raise ValueError(
            f"indices: got {len(indices)} for {len(weights)} weights, allowed is one a weight"
        )
    found: list[Tensor] = _gather_many([weight.detach() for weight in weights], list(indices))
    return found


def gather_reference(weight: Tensor, indices: Tensor) -> Tensor:
    """Oracle of `gather`: one entry after another."""
    flat = weight.detach().flatten()
    return flat.new_tensor([flat[j].item() for j in indices.tolist()])


def _plain(weights: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    return [gather(weight, at) for weight, at in zip(weights, indices, strict=True)]


def _fake(weights: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    return [w.new_empty(at.shape) for w, at in zip(weights, indices, strict=True)]


_gather_many = define(
    "gather_many(Tensor[] weights, Tensor[] indices) -> Tensor[]",
    plain=_plain,
    triton="positions:gather_many",
    fake=_fake,
)
