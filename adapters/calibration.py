"""What a method that chooses its support by batches of the training data tells `calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sft.adapters.ranks import Ranks


class Calibration(Protocol):
    """Accumulates scores while batches run, then chooses the support of one adapter.

    `backward` tells whether the batches need a backward pass, and so labels. `ranks` are the
    processes that read different batches and choose alike; `calibrate` sets them.
    """

    backward: bool
    ranks: Ranks

    def num_batches(self, available: int | None) -> int:
        """Return how many batches are to be read, of so many; None where that is not known."""

    def open(self) -> None:
        """Begin to listen."""

    def before_batch(self, batch: Mapping[str, Any]) -> None:
        """Take note of the batch that runs next, such as its padding."""

    def close(self) -> None:
        """Stop listening, whatever happened."""

    def choose(self, count: int) -> None:
        """Choose the support by what `count` batches gave.

        Raises:
            ValueError: a layer was not reached.
        """
