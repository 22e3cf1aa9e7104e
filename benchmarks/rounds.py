"""Interleaved timing: one step of each case a round, the first round thrown away."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def interleave(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each step reported, by round.

    Args:
        steps: run one step and return its process CPU seconds.
        rounds: how many are kept; one more warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            seconds = step()
            if turn:
                times[name].append(seconds)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median seconds of each case."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratios(seconds: Mapping[str, float], to: str) -> dict[str, float]:
    """Return each case's seconds over those of another."""
    return {name: round(value / seconds[to], 3) for name, value in seconds.items()}
