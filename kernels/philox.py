"""Philox4x32-10: random words that are a pure function of a key and a counter."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint32]
Part: TypeAlias = "int | NDArray[Any]"

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
# Counters taken at once: three buffers of 256 KiB stay in a core's second-level cache, and the
# fifty calls into numpy are spread over enough of them (28 ns a counter; 80 ns at 2048).
BLOCK = 16384


def philox(key: tuple[int, int], counters: Sequence[Part], out: Words | None = None) -> Words:
    """Return four random 32-bit words for each counter.

        one round:  (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

    ten times, the key growing by a Weyl constant in between.

    Args:
        key: the low and the high 32 bits.
        counters: four parts of 32 bits, each an integer or an array (n,) of integers.
        out: (n, 4) uint32 to write to, rows contiguous.

    Paper: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """  # noqa: E501  (the equation on one line)
    count = max((np.size(part) for part in counters if np.ndim(part)), default=1)
    words = np.empty((count, 4), np.uint32) if out is None else out
    for first in range(0, count, BLOCK):
        block = [part if np.ndim(part) == 0 else part[first : first + BLOCK] for part in counters]  # type: ignore[index]
        _fill(key, block, words[first : first + BLOCK])
    return words


_kept = threading.local()
_MULTIPLIERS = np.array(MULTIPLIERS, np.uint64)[:, None]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _fill(key: tuple[int, int], counters: Sequence[Part], words: Words) -> None:
    """Write the words of at most `BLOCK` counters."""
    if not hasattr(_kept, "buffers"):
        _kept.buffers = np.empty((3, 2, BLOCK), np.uint64)
    # the high half of the 64-bit products is the first state pair, the low half the second:
    # `last` keeps whole products, whose high bits are cleared where they are mixed in
    state, product, last = _kept.buffers[:, :, : len(words)]
    state[0], last[0], state[1], last[1] = counters
    for mix in _round_keys(key):
        np.multiply(state, _MULTIPLIERS, out=product)
        np.right_shift(product, _HALF, out=state)
        np.bitwise_xor(state, last[::-1], out=state)
        np.bitwise_xor(state, mix, out=state)
        np.bitwise_and(state, _LOW, out=state)
        state = state[::-1]
        product, last = last, product[::-1]
    words[:, 0], words[:, 1], words[:, 2], words[:, 3] = state[0], last[0], state[1], last[1]


def _round_keys(key: tuple[int, int]) -> NDArray[np.uint64]:
    """(rounds, 2, 1): what is mixed into the halves from M0 c0 and from M1 c2."""
    low, high = key
    keys = [
        ((high + turn * WEYL[1]) % 2**32, (low + turn * WEYL[0]) % 2**32) for turn in range(ROUNDS)
    ]
    return np.array(keys, np.uint64)[:, :, None]


def philox_reference(
    key: tuple[int, int], counter: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """Oracle of `philox`: one counter, in Python's integers (section 3.3 of the paper)."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3
