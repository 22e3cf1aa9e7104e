"""A run in stages of growing penalty: SoRA's schedule (arXiv 2311.11696, Algorithm 1)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from sft.adapters.config import require

PATHS = ("linear", "geometric", "log_linear")


def strengths_between(path: str, first: float, last: float, count: int) -> list[float]:
    """Return `count` strengths from `first` to `last`, both included.

    "linear" is linspace, "geometric" has a constant ratio, "log_linear" is log(linspace(e^a, e^b)).

    Raises:
        ValueError: unknown path, a geometric one that touches 0, or a strength too large for exp.
    """
    require("strength_path", path, path in PATHS, ", ".join(PATHS))
    if path == "geometric":
        require("strength", first, min(first, last) > 0, "above 0 with strength_path='geometric'")
        found = np.geomspace(first, last, count)
    elif path == "log_linear":
        most = max(first, last)
        require("strength", most, most < 700, "below 700 with strength_path='log_linear', for exp")
        found = np.log(np.linspace(np.exp(first), np.exp(last), count))
    else:
        found = np.linspace(first, last, count)
    return [float(value) for value in found]


def stage_ends(total: int, count: int, first_share: float | None) -> tuple[int, ...]:
    """Return after how many updates each stage ends; the last one ends the run.

    Args:
        total: updates of the run.
        count: stages.
        first_share: share of the run that the first stage takes; None for stages of one length.

    Raises:
        ValueError: fewer updates than stages.
    """
    if count == 1:
        return (total,)
    enough = total >= count
    require("max_steps", total, enough, f"at least {count}, one update for each stage of strength")
    first = total / count if first_share is None else total * first_share
    head = min(max(1, round(first)), total - count + 1)
    return (head, *(head + (total - head) * i // (count - 1) for i in range(1, count)))


def stage_of(step: int, ends: Sequence[int]) -> int:
    """Return the stage, from 0, to which update `step + 1` belongs; after the last, the last."""
    return min(bisect.bisect_right(ends, step), len(ends) - 1)
