"""Rewards of one completion: higher is better, from its text and the right answer."""

from __future__ import annotations

import re

from sft.evaluation.completions import edit_distance


def exact_match(completion: str, reference: str) -> float:
    """Return 1 for the right answer, up to white space, else 0."""
    return float(completion.split() == reference.split())


def token_error_rate(completion: str, reference: str) -> float:
    """Return minus the edits over the reference's length, in white-space tokens; -1 at least.

    Of phonemes it is minus the phoneme error rate, of words minus the word error rate.
    """
    right = reference.split()
    return -min(1.0, edit_distance(completion.split(), right) / max(len(right), 1))


def length(completion: str, target: int) -> float:
    """Return minus the distance to `target` white-space tokens, as a share of it; -1 at least."""
    return -min(1.0, abs(len(completion.split()) - target) / target)


def pattern_match(completion: str, pattern: str) -> float:
    """Return 1 where the whole completion fits the regular expression, `.` a new line too."""
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)
