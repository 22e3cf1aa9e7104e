"""The effective weight at the trained positions: original plus delta."""

from __future__ import annotations

from torch import Tensor


def compose(originals: Tensor, values: Tensor, *, reference: bool = False) -> Tensor:
    """Return w0 + delta in the dtype of the weight.

    The sum is taken in the wider dtype and rounded once. SpIEL's authors (arXiv 2401.16405) round
    the delta to the weight's dtype first and add there; `reference=True` does the same.

    Args:
        originals: (k,) pre-trained entries, any float dtype.
        values: (k,) deltas, usually float32.
        reference: round the delta before adding.

    Returns:
        (k,) in the dtype of `originals`.
    """
    if reference:
        return originals + values.to(originals.dtype)
    return (originals + values).to(originals.dtype)


def compose_reference(originals: Tensor, values: Tensor, *, reference: bool = False) -> Tensor:
    """Oracle of `compose`: the sum in float64, rounded to the weight's dtype."""
    if reference:
        values = values.to(originals.dtype)
    return (originals.double() + values.double()).to(originals.dtype)
