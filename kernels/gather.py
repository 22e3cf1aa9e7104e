"""Read a matrix at flat positions."""

from __future__ import annotations

from torch import Tensor


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of `weight` at flat positions: out[j] = weight.flat[indices[j]].

    Args:
        weight: contiguous, any shape and dtype.
        indices: (k,) int32 or int64, each in [0, weight.numel()).

    Returns:
        (k,) a copy, in the dtype of `weight`.
    """
    return weight.detach().view(-1).index_select(0, indices)


def gather_reference(weight: Tensor, indices: Tensor) -> Tensor:
    """Oracle of `gather`: one entry after another."""
    flat = weight.detach().flatten()
    return flat.new_tensor([flat[j].item() for j in indices.tolist()])
