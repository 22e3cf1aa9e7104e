"""Interleaved timing: one step of each case a round, the first round thrown away."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Time = TypeVar("Time")


def interleave(
    steps: Mapping[str, Callable[[], Time]],
    rounds: int,
    *,
    warm_up: bool = True,
    seconds: float = 0.0,
) -> dict[str, list[Time]]:
    """Return what each step reported, by round.

    Args:
        steps: run one step and return its seconds, or its seconds by part.
        rounds: how many are kept, at least.
        warm_up: run one more before them.
        seconds: go on until so much time has passed.
    """
    times: dict[str, list[Time]] = {name: [] for name in steps}
    turn, end = -int(warm_up), time.monotonic() + seconds
    while turn < rounds or time.monotonic() < end:
        for name, step in steps.items():
            reported = step()
            if turn >= 0:
                times[name].append(reported)
        turn += 1
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median seconds of each case."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratios(seconds: Mapping[str, float], to: str) -> dict[str, float]:
    """Return each case's seconds over those of another."""
    return {name: round(value / seconds[to], 3) for name, value in seconds.items()}
