"""Split the time of a step by part; a part inside another takes its time from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("forward", "backward", "optimizer", "selection")


class Clock:
    """Process CPU seconds by part, all threads together, and the wall seconds of the whole."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, "wall"), 0.0)
        self._open: list[str] = []
        self._since = 0.0
        self._began = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block to a part."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def stop(self) -> dict[str, float]:
        """Return the seconds of every part, and "wall"."""
        self.seconds["wall"] = time.perf_counter() - self._began
        return self.seconds

    def _charge(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
