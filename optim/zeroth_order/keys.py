"""Keys of the noise: one for each draw, one for each parameter."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable


def step_key(seed: int, step: int, query: int) -> int:
    """Return the 64-bit Philox key of one direction.

    Args:
        seed: of the run, >= 0.
        step: number of the update, from 0.
        query: number of the direction in the update, from 0; over all processes.
    """
    return _hash(struct.pack("<QQQ", seed & (2**64 - 1), step, query), 8)


def mask_key(seed: int) -> int:
    """Return the key of a run's random mask."""
    return _hash(struct.pack("<Q", seed & (2**64 - 1)) + b"mask", 8)


def parameter_ids(names: Iterable[str]) -> dict[str, int]:
    """Return a 32-bit number for each name: of the name alone, unless two names collide.

    Of two names with one hash the later in alphabetical order takes the next free number.
    """
    found: dict[str, int] = {}
    taken: set[int] = set()
    for name in sorted(names):
        number = _hash(name.encode(), 4)
        while number in taken:
            number = (number + 1) % 2**32
        taken.add(number)
        found[name] = number
    return found


def _hash(content: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=size).digest(), "little")
