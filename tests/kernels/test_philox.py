"""The published vectors, and the vectorised form against one counter at a time."""

from __future__ import annotations

import numpy as np
import pytest

from sft.kernels.philox import BLOCK, philox, philox_reference

FULL = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_published_vectors(name: str) -> None:
    counter, key, words = KNOWN[name]
    assert philox_reference(key, counter) == words
    assert tuple(philox(key, counter)[0].tolist()) == words


@pytest.mark.parametrize("count", [1, 7, BLOCK + 3], ids=lambda n: f"{n} counters")
def test_every_counter_is_its_own(count: int) -> None:
    generator = np.random.default_rng(0)
    parts = generator.integers(0, 2**32, (4, count), dtype=np.uint64)
    key = (0x12345678, 0x9ABCDEF0)
    words = philox(key, parts)
    assert words.shape == (count, 4)
    for at in {0, count // 2, count - 1}:
        assert tuple(words[at].tolist()) == philox_reference(key, tuple(parts[:, at].tolist()))


def test_parts_may_be_single_numbers() -> None:
    words = philox((5, 6), (np.arange(9), 1, 2, np.full(9, 3)))
    assert [tuple(row) for row in words.tolist()] == [
        philox_reference((5, 6), (index, 1, 2, 3)) for index in range(9)
    ]


def test_it_writes_where_it_is_told() -> None:
    out = np.zeros((4, 4), np.uint32)
    assert philox((1, 2), (np.arange(4), 0, 0, 0), out) is out
    assert np.array_equal(out, philox((1, 2), (np.arange(4), 0, 0, 0)))
