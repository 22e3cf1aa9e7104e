"""One zeroth-order update: losses at displaced weights, over micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.estimate import conservative_choice, projected_gradients
from sft.optim.zeroth_order.guard import DivergenceGuard
from sft.optim.zeroth_order.inplace import InplaceMode
from sft.optim.zeroth_order.modes import Draws, Mode
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer

Loss = Callable[[], float]
Exchange = Callable[[Sequence[float]], list[list[float]]]


@dataclass(frozen=True)
class Processes:
    """The processes of a run: what they exchange are a few numbers an update."""

    rank: int
    count: int
    exchange: Exchange  # the numbers of this process -> those of all, by rank


ALONE = Processes(0, 1, lambda numbers: [list(numbers)])


class Engine:
    """Feeds an optimizer with projected gradients.

    Every micro-batch of an update is evaluated at the same displaced weights; the sums of its
    losses are exchanged when the last one is in, so processes stay bit-identical.

    Args:
        config: what is estimated, and how.
        optimizer: gets the projected gradients of each update.
        mode: displaces the weights.
        processes: whom to exchange losses with.
    """

    def __init__(
        self,
        config: ZerothOrderConfig,
        optimizer: ZerothOrderOptimizer,
        mode: Mode,
        processes: Processes = ALONE,
    ) -> None:
        self._config, self._optimizer, self._mode = config, optimizer, mode
        self._processes = processes
        self._guard = DivergenceGuard(config)
        own = config.parallel == "queries"
        self._total = config.queries * (processes.count if own else 1)
        self._first = config.queries * processes.rank if own else 0
        self._sums: list[float] = []
        self.last_gradients: list[float] = []

    def evaluate(self, loss: Loss, *, last: bool) -> float:
        """Evaluate one micro-batch, the last of its update or not; return its loss.

        Args:
            loss: evaluates the micro-batch with the weights that the model computes with; its
                values add up to the loss of the update.
            last: propose the update to the optimizer after this one.

        Raises:
            ValueError: the run has diverged, or its loss does not depend on what is trained.
        """
        keys = self._optimizer.keys(self._total)
        mine = keys[self._first : self._first + self._config.queries]
        whole_update = last and not self._sums
        self._sums = self._sums or [0.0] * self._evaluations
        try:
            losses = self._losses(loss, mine)
            self._sums = [a + b for a, b in zip(self._sums, losses, strict=True)]
            if last:
                self._propose(loss, whole_update)
        except BaseException:
            self._sums = []
            self._mode.settle()
            raise
        if last and isinstance(self._mode, InplaceMode):
            # the optimizer restores and updates in one pass over the weights
            self._optimizer.moved, self._mode.standing = self._mode.standing, ()
        else:
            self._mode.settle()
        return self._value(losses)

    def close(self) -> None:
        """Let the model compute with w again, even if an update was proposed and never made."""
        if isinstance(self._mode, InplaceMode) and self._optimizer.moved:
            self._mode.standing, self._optimizer.moved = self._optimizer.moved, ()
        self._mode.close()

    def _losses(self, loss: Loss, keys: Sequence[int]) -> list[float]:
        """Return L(w) if the estimator asks for it, then for each direction its losses."""
        found = [self._at((), loss)] if self._has_base else []
        for key in keys:
            for offset in self._offsets:
                found.append(self._at(((key, offset),), loss))
        return found

    @property
    def _evaluations(self) -> int:
        return self._has_base + self._config.queries * len(self._offsets)

    @property
    def _has_base(self) -> bool:
        return self._config.estimator != "two_side" or self._config.update == "conservative"

    @property
    def _offsets(self) -> tuple[float, ...]:
        """Coefficients of w - c z, the plus side first."""
        eps = self._config.eps
        return (-eps,) if self._config.estimator == "one_side" else (-eps, eps)

    def _at(self, draws: Draws, loss: Loss) -> float:
        self._mode.move(draws)
        return float(loss())

    def _value(self, losses: Sequence[float]) -> float:
        """Return the loss to show: L(w), or the mean of what was evaluated."""
        return losses[0] if self._has_base else sum(losses) / len(losses)

    def _propose(self, loss: Loss, whole_update: bool) -> None:
        """Turn the sums of all processes into projected gradients."""
        sums, self._sums = self._sums, []
        rows = self._processes.exchange([*sums, 1.0])
        if self._config.parallel == "data":
            total = sum(row[-1] for row in rows)
            rows = [[_sum(column) / total for column in list(zip(*rows, strict=True))[:-1]]]
        else:
            rows = [row[:-1] for row in rows]
        gradients: list[float] | None = []
        for row in rows:
            found = self._estimated(row)
            gradients = None if found is None or gradients is None else gradients + found
        value = _sum([self._value(row) for row in rows]) / len(rows)
        if gradients is not None and self._config.update == "conservative":
            gradients = self._chosen(gradients, value, loss, whole_update)
        flat = [x for row in rows for x in row]
        self._guard.feed(value, flat, lr=self._optimizer.param_groups[0]["lr"])
        self.last_gradients = gradients or []
        self._optimizer.propose(gradients)

    def _estimated(self, row: Sequence[float]) -> list[float] | None:
        """Return the projected gradients of one row of losses, None if one is not finite."""
        base = row[0] if self._has_base else None
        sides = row[1:] if self._has_base else row
        width = len(self._offsets)
        plus = sides[::width]
        minus = sides[1::width] if width == 2 else None
        return projected_gradients(self._config, plus, minus, base)

    def _chosen(
        self, gradients: list[float], base: float, loss: Loss, whole_update: bool
    ) -> list[float]:
        """Keep the best of w, w - u and w + u on this very batch."""
        if not whole_update:
            raise ValueError(
                "update: 'conservative' compares candidates on the whole batch of an update; set "
                "gradient_accumulation_steps=1 and a larger per_device_train_batch_size"
            )
        step = self._optimizer.coefficients(gradients)
        back = [(key, -coefficient) for key, coefficient in step]
        losses = [self._at(draws, loss) for draws in (step, back)]
        rows = self._processes.exchange(losses)
        forth, back_loss = (_sum(column) / len(rows) for column in zip(*rows, strict=True))
        choice = conservative_choice(base, forth, back_loss)
        return [choice * g for g in gradients]


def _sum(numbers: Sequence[float]) -> float:
    """Add up without rounding on the way; what is not finite makes the sum so."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan
