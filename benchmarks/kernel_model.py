"""A lower bound of each GPU kernel's time on an H100: a model, not a measurement.

What a kernel has to move and multiply follows from its arguments; what it issues is read from its
compiled code: instructions of a program, its hot loop as often as it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from without_gpu.audit import Audit
from without_gpu.model import H100, least_seconds

SECTOR = 32  # bytes that one random access moves
SIDE, TOKENS = 4096, 2048
ENTRIES = SIDE * SIDE
PICKED = ENTRIES // 100


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a launch has to do.

    Args:
        about: its size, in words.
        entries: how many it works on.
        memory: bytes to and from memory.
        cache: bytes to and from the second-level cache, where more than to memory.
        per_program: entries of one program.
        turns: how often a program's hot loop runs.
        operations: of tensor cores.
    """

    about: str
    entries: int
    memory: float
    per_program: int
    cache: float = 0.0
    turns: int = 1
    operations: float = 0.0


_ONE_PERCENT = "4096 x 4096 bf16, 1 %"
_DENSE = "4096 x 4096 bf16"
_PRODUCT = "4096 x 4096 bf16, 2048 tokens"
_OPERANDS = 2.0 * 2 * TOKENS * SIDE


def _positions(useful: int, sectors: int) -> Work:
    """Bytes that lie side by side, and sectors at random, of each position."""
    moved = PICKED * (useful + sectors * SECTOR)
    return Work(about=_ONE_PERCENT, entries=PICKED, memory=moved, per_program=1024)


def _noise() -> Work:
    return Work(about=_DENSE, entries=ENTRIES, memory=4 * ENTRIES, per_program=4096)


def _sampled(share: float) -> Work:
    count = int(ENTRIES * share)
    return Work(
        about=f"{_PRODUCT}, {share:.2%}",
        entries=count,
        memory=_OPERANDS + 8 * count,
        cache=count * 4.0 * TOKENS,
        per_program=16,
        turns=TOKENS // 128,
    )


def _tiles(side: int) -> Work:
    tiles = (SIDE // side) ** 2
    return Work(
        about=f"{_PRODUCT}, 1 %",
        entries=tiles,
        memory=_OPERANDS + 12 * PICKED,
        per_program=1,
        turns=TOKENS // 64,
        operations=2.0 * ENTRIES * TOKENS,
    )


# by the name of the build whose code is audited
WORK = {
    "positions: gather": _positions(4 + 2, 1),
    "positions: write": _positions(4 + 2, 2),
    "positions: write a sum": _positions(4 + 4 + 2, 2),
    "positions: add": _positions(4 + 4, 2),
    "adamw: update": _positions(36, 0),
    "adamw: update and write": _positions(36 + 4 + 2, 2),
    "displace: rademacher": _noise(),
    "displace: gaussian_table": _noise(),
    "displace: gaussian": _noise(),
    "sampled: bfloat16": _sampled(0.0025),
    "tiles: picked, bfloat16": _tiles(128),
    "tiles: picked, small tiles": _tiles(64),
}


def bound(name: str, found: Audit) -> dict[str, Any] | None:
    """Return a lower bound for a build, and what sets it; None where its work is not stated."""
    work = WORK.get(name)
    if work is None:
        return None
    once = found.instructions.total()
    issued = once + (work.turns - 1) * found.hot.total() if found.loops else once
    seconds, slowest = least_seconds(
        H100,
        memory=work.memory,
        cache=max(work.cache, work.memory),
        instructions=work.entries / work.per_program * found.warps * issued,
        operations=work.operations,
    )
    return {
        "about": work.about,
        "microseconds": round(seconds * 1e6, 2),
        "set_by": slowest,
        "memory_mib": round(work.memory / 2**20, 2),
    }
