"""Positions where the absolute gradient, summed over calibration batches, is largest."""

from __future__ import annotations

from torch import Tensor

from sft.adapters.select import Candidates

CALIBRATED = True


def increment(gradient: Tensor) -> Tensor:
    """Return |g|, what one batch adds to the score."""
    return gradient.abs()


def select(candidates: Candidates, k: int) -> Tensor:
    """Return the k positions of largest (or smallest) accumulated |g|."""
    assert candidates.scores is not None
    return candidates.best(candidates.scores, k)
