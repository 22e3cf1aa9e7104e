"""One way to train, and one step of it by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from allocations import peak_bytes
from census import held_bytes, reachable
from clock import Clock
from torch import Tensor, nn
from torch.profiler import record_function

from sft.adapters.dynamics import Dynamics
from sft.adapters.layer import sparse_layers
from sft.optim.move import move_state

Batch = dict[str, Tensor]


class Case:
    """A model, its optimizer, and a step of the two.

    Args:
        model: trained in place.
        optimizer: None for the floor, which updates nothing.
        write: brings the trained values to where forward uses them, after each update.
        dynamics: changes the support from update to update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        write: Callable[[], None] = lambda: None,
        dynamics: Dynamics | None = None,
    ) -> None:
        self.model, self.optimizer, self.write = model, optimizer, write
        self.dynamics = dynamics
        self.steps, self.loss = 0, float("nan")

    def step(self, batch: Batch) -> dict[str, float]:
        """Run one step; return its process CPU seconds by part, and its wall seconds."""
        clock = Clock()
        with clock.part("selection"):
            self._before(clock)
        with clock.part("forward"), record_function("part: forward"):
            loss = self.model(**batch).loss
        with clock.part("backward"), record_function("part: backward"):
            loss.backward()
        self.loss = loss.item()
        del loss
        with clock.part("optimizer"), record_function("part: optimizer"):
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.write()
        self.steps += 1
        with clock.part("selection"), record_function("part: selection"):
            self._after()
        return clock.stop()

    def saved_bytes(self, batch: Batch) -> Counter[str]:
        """Count what autograd keeps between forward and backward, by module class."""
        from saved import saved_bytes

        return saved_bytes(self.model, batch, list(reachable(self.model, self.optimizer)))

    def peak_bytes(self, batch: Batch) -> int:
        """Count the bytes that live at once in a step beyond those held before it."""
        return peak_bytes(lambda: self.step(batch), warm_up=False)

    def held_bytes(self) -> dict[str, int]:
        """Count the bytes held between two steps, by kind."""
        return held_bytes(self.model, self.optimizer)

    def num_trained(self) -> int:
        """Count the trained weights."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _before(self, clock: Clock) -> None:
        if self.dynamics is None:
            return
        self.dynamics.before_update(self.steps, 1)
        for layer in sparse_layers(self.model).values():
            site = layer.site("default")  # type: ignore[operator]
            if site.tap is not None:
                site.tap = _timed(site.tap, clock)

    def _after(self) -> None:
        if self.dynamics is None:
            return
        self.dynamics.after_gradients(1.0)
        for change in self.dynamics.after_update(self.steps, lambda _: None):
            move_state(
                self.optimizer, change.parameter, change.source, dim=change.dim,
                mean_grad=change.mean_grad, mean_square=change.mean_square, updates=change.updates,
            )  # fmt: skip


def _timed(tap: Callable[[Any], None], clock: Clock) -> Callable[[Any], None]:
    """Count what a tap does inside backward to selection."""

    def observe(outer: Any) -> None:
        with clock.part("selection"), record_function("part: selection"):
            tap(outer)

    return observe
