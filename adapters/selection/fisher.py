"""Positions of the largest diagonal Fisher information: squared gradients over calibration batches.

Sung et al., arXiv 2111.09839, eq. 6, with the empirical labels and one term a batch.
"""

from __future__ import annotations

from torch import Tensor

from sft.adapters.select import Candidates

CALIBRATED = True


def increment(gradient: Tensor) -> Tensor:
    """Return g^2, what one batch adds to the score."""
    return gradient.square()


def select(candidates: Candidates, k: int) -> Tensor:
    """Return the k positions of largest (or smallest) accumulated g^2."""
    assert candidates.scores is not None
    return candidates.best(candidates.scores, k)
