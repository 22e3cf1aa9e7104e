"""Stops a run that has gone wrong, with one line that says what to change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from sft.optim.zeroth_order.config import ZerothOrderConfig

WINDOW = 20  # updates whose mean loss is compared
# updates in which no side differed before the loss is called blind to the weights; the share of
# right answers may well stay the same for a while
BLIND, BLIND_COUNTS = 10, 100


class DivergenceGuard:
    """Watches the losses of a run.

    Raises from `feed` when the loss has risen by `config.divergence`, when `config.max_skipped`
    updates in a row had to be skipped, or when the perturbation never changed the loss.

    Args:
        config: gives the bounds, and eps for the messages.
    """

    def __init__(self, config: ZerothOrderConfig) -> None:
        self._config = config
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._streak = 0
        self._blind: int | None = 0  # None once a side has differed

    def feed(self, loss: float, losses: Sequence[float], *, lr: float) -> None:
        """Take the losses of one update.

        Args:
            loss: mean loss of the update.
            losses: all that it was estimated from.
            lr: learning rate, for the messages.

        Raises:
            ValueError: the run is not worth going on with.
        """
        if not all(map(math.isfinite, [loss, *losses])):
            self._streak += 1
            if self._streak >= self._config.max_skipped:
                raise ValueError(self._not_finite(float(lr)))
            return
        self._streak = 0
        self._check_blind(losses)
        self._check_risen(loss, float(lr))

    def _not_finite(self, lr: float) -> str:
        return (
            f"learning_rate: the loss was not finite in {self._streak} updates in a row at "
            f"lr={lr:g}, eps={self._config.eps:g}; try learning_rate={lr / 3:.2g}, a smaller eps, "
            "or bfloat16 or float32 weights in place of float16"
        )

    def _check_blind(self, losses: Sequence[float]) -> None:
        if self._blind is None or any(other != losses[0] for other in losses):
            self._blind = None
            return
        self._blind += 1
        counted = self._config.objective != "loss"
        if self._blind >= (BLIND_COUNTS if counted else BLIND):
            remedy = (
                "it is a count that so small a change cannot tip, set a larger eps or batch"
                if counted
                else "in GRPO set num_iterations=2, whose loss is constant on policy; otherwise "
                "set a larger eps, or train float32 weights: on a 16-bit grid small changes vanish"
            )
            raise ValueError(
                f"eps: got {self._config.eps:g}, at which the loss was the same on all sides in "
                f"each of the first {self._blind} updates, so it shows no direction; {remedy}"
            )

    def _check_risen(self, loss: float, lr: float) -> None:
        if self._config.divergence is None:
            return
        self._recent.append(loss)
        if len(self._first) < WINDOW:
            self._first.append(loss)
            return
        first, now = math.fsum(self._first) / WINDOW, math.fsum(self._recent) / WINDOW
        if now - first > self._config.divergence:
            raise ValueError(
                f"learning_rate: got {lr:g}, at which the mean loss of {WINDOW} updates rose from "
                f"{first:.3g} to {now:.3g}; try learning_rate={lr / 3:.2g} or more queries "
                f"(divergence={self._config.divergence:g} sets the bound, null none)"
            )
