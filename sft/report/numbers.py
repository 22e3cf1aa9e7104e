"""Numbers as people read them."""

from __future__ import annotations

import math


def figure(value: float) -> str:
    """Return four digits that count: 0.08123, 1.234, 512, 1.2e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3g}".partition("e")[::2]
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count(value: float) -> str:
    """Return a count with a letter: 812, 1.06 M, 134 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Return bytes as MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def percent(value: float) -> str:
    """Return a share as a percentage of three digits."""
    return f"{100 * value:.3g} %"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, the two largest that count."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
