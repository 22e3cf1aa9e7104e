"""The phases of a run, each printed with the time it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console


class Phases:
    """Prints a line as each phase ends, and keeps the seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._note = ""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; `note` inside it says what came out."""
        began, self._note = time.monotonic(), ""
        yield
        self.seconds[name] = round(time.monotonic() - began, 2)
        line = f"{name:<12}{self.seconds[name]:>7.1f} s   {self._note}".rstrip()
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """Set what the current phase's line says."""
        self._note = text
