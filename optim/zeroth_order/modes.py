"""How a model comes to compute with displaced weights: what every mode can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Draws = Sequence[tuple[int, float]]  # (key of the noise, coefficient), of w - sum_q c_q z_q


class Mode(Protocol):
    """Displaces the weights that a model computes with."""

    def move(self, draws: Draws) -> None:
        """Let the model compute with w - sum_q c_q z_q from now on; with () with w."""

    def settle(self) -> None:
        """Let the model compute with w again."""

    def close(self) -> None:
        """Settle for good."""


def nothing() -> None:
    """Do nothing: for models whose weights are where their tensors are."""
