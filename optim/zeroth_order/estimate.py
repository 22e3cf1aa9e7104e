"""From losses to projected gradients: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sft.optim.zeroth_order.config import ZerothOrderConfig

CURVATURE_POWER = 0.1  # of 1.5-SPSA's weights


def projected_gradients(
    config: ZerothOrderConfig,
    plus: Sequence[float],
    minus: Sequence[float] | None,
    base: float | None,
) -> list[float] | None:
    """Return the projected gradient of each direction, as it is used and logged.

    Clipped first, then rounded to `log_dtype`, so that what is replayed is what was applied.

    Args:
        config: gives estimator, eps, clip and log_dtype.
        plus: L(w + eps z) for each direction.
        minus: L(w - eps z) for each, or None for one_side.
        base: L(w), or None for two_side.

    Returns:
        one number a direction, or None when a loss or a result is not finite: the update is to be
        skipped whole, as a mean over the directions left would not be the one asked for.
    """
    losses = [*plus, *(minus or ()), *(() if base is None else (base,))]
    if not all(map(math.isfinite, losses)):
        return None
    found = _raw(config, plus, minus, base)
    if config.clip is not None:
        found = [min(max(g, -config.clip), config.clip) for g in found]
    found = rounded(found, config.log_dtype)
    return found if all(map(math.isfinite, found)) else None


def two_side(plus: float, minus: float, eps: float) -> float:
    """Return (L(w + eps z) - L(w - eps z)) / (2 eps)."""
    return (plus - minus) / (2 * eps)


def one_side(plus: float, base: float, eps: float) -> float:
    """Return (L(w + eps z) - L(w)) / eps."""
    return (plus - base) / eps


def curvature_weight(plus: float, base: float, minus: float, eps: float) -> float:
    """Return 1 / max(1, |c|^0.1) with c = (L(w + eps z) - 2 L(w) + L(w - eps z)) / eps^2.

    1.5-SPSA multiplies a two-sided estimate by it: sharp directions count for less.
    """
    curvature = (plus - 2 * base + minus) / eps**2
    sharpness: float = abs(curvature) ** CURVATURE_POWER
    return 1 / max(1.0, sharpness)


def rounded(numbers: Sequence[float], dtype: str) -> list[float]:
    """Return the nearest numbers that a dtype ("float32", "float16") holds, infinite beyond."""
    kept: list[float] = torch.tensor(list(numbers), dtype=getattr(torch, dtype)).tolist()
    return kept


def conservative_choice(start: float, forth: float, back: float) -> int:
    """Return which of three points has the lowest loss: 1, -1 or 0.

    Ties favour the move, and of the two moves the one along the estimate. A candidate whose loss
    is not finite is never chosen.

    Args:
        start: L(w).
        forth: L(w - u) for the update u.
        back: L(w + u).

    Returns:
        what to multiply the projected gradients by: 1 for w - u, -1 for w + u, 0 to stay.
    """
    ahead = forth if math.isfinite(forth) else math.inf
    behind = back if math.isfinite(back) else math.inf
    if not math.isfinite(start) or min(ahead, behind) > start:
        return 0
    return 1 if ahead <= behind else -1


def _raw(
    config: ZerothOrderConfig,
    plus: Sequence[float],
    minus: Sequence[float] | None,
    base: float | None,
) -> list[float]:
    eps = config.eps
    if config.estimator == "one_side":
        assert base is not None
        return [one_side(p, base, eps) for p in plus]
    assert minus is not None
    found = [two_side(p, m, eps) for p, m in zip(plus, minus, strict=True)]
    if config.estimator == "two_side":
        return found
    assert base is not None
    weights = [curvature_weight(p, base, m, eps) for p, m in zip(plus, minus, strict=True)]
    return [weight * g for weight, g in zip(weights, found, strict=True)]
