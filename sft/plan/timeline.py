"""Bytes alive over time, weighed by what they are for, and where they peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Share = Callable[[str], float]
NEVER = 2**62
# what bytes are for
WEIGHTS, TRAINED, INDICES, ORIGINALS = "weights", "trained", "indices", "originals"
OPTIMIZER, GRADIENTS, ACTIVATIONS = "optimizer", "gradients", "activations"
TRANSIENTS = "transients"
KINDS = (
    WEIGHTS, TRAINED, INDICES, ORIGINALS, OPTIMIZER, GRADIENTS, ACTIVATIONS, TRANSIENTS,
)  # fmt: skip
HELD = (WEIGHTS, TRAINED, INDICES, ORIGINALS, OPTIMIZER)


@dataclass(eq=False)
class Piece:
    """A storage: its bytes, its life in operations, what its first tensor held, what it is for."""

    size: int
    born: int
    floating: bool
    died: int = NEVER
    kind: str = TRANSIENTS


@dataclass(frozen=True)
class Work:
    """An operation: when, its floating point operations, the bytes it reads and writes."""

    clock: int
    flops: int
    moved: int


@dataclass
class Timeline:
    """A step of training.

    Args:
        pieces: every storage of it.
        spikes: bytes that an operation took for itself, by clock.
        work: what operations did.
        phases: names and first clocks of the parts of the step; it ends where the last one is.
    """

    pieces: list[Piece] = field(default_factory=list)
    spikes: dict[int, int] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    phases: list[tuple[str, int]] = field(default_factory=list)

    def spans(self) -> list[tuple[str, int, int]]:
        """Return name, first clock and end of each part."""
        pairs = zip(self.phases, self.phases[1:], strict=False)
        return [(name, start, stop) for (name, start), (_, stop) in pairs]

    def keep_from(self, begin: int) -> None:
        """Take what was made since a clock and is alive for held all the time; forget work before.

        Views of a pattern, say, are made once, and stay.
        """
        for piece in self.pieces:
            if piece.born > begin and piece.died == NEVER:
                piece.born, piece.kind = begin, ORIGINALS if piece.floating else INDICES
        self.work = [work for work in self.work if work.clock > begin]

    def peaks(self, share: Share = lambda kind: 1.0) -> dict[str, Counter[str]]:
        """Return for each part of the step the bytes at its peak, by kind.

        Args:
            share: what part of the bytes of a kind lies on the device.
        """
        return {name: self._peak(start, stop, share) for name, start, stop in self.spans()}

    def held(self, kind: str) -> int:
        """Return the bytes of a kind that live through the whole step."""
        first, last = self.phases[0][1], self.phases[-1][1]
        return sum(
            p.size for p in self.pieces if p.kind == kind and p.born <= first < last <= p.died
        )

    def most(self, kind: str) -> int:
        """Return the most bytes of a kind that live at once."""
        parts = self.peaks(lambda other: float(other == kind))
        return max((sum(part.values()) for part in parts.values()), default=0)

    def _peak(self, start: int, stop: int, share: Share) -> Counter[str]:
        """Return what is alive when most is, between two clocks."""
        shares = {kind: share(kind) for kind in KINDS}
        change: Counter[int] = Counter()
        for piece in self.pieces:
            size = piece.size * shares[piece.kind]
            change[piece.born] += size  # type: ignore[assignment]
            change[piece.died] -= size  # type: ignore[assignment]
        live, best, when = 0.0, -1.0, start
        own = shares[TRANSIENTS]
        for clock in sorted({*change, *self.spikes, start}):
            live += change[clock]
            if not start <= clock < stop:
                continue
            found = live + own * self.spikes.get(clock, 0)
            if found > best:
                best, when = found, clock
        parts: Counter[str] = Counter()
        parts[TRANSIENTS] += round(own * self.spikes.get(when, 0))
        for piece in self.pieces:
            if piece.born <= when < piece.died:
                parts[piece.kind] += round(piece.size * shares[piece.kind])
        return +parts
