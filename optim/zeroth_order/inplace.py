"""Evaluate at displaced weights by writing to them: no memory, and a drift of rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sft.kernels.displace import displace
from sft.optim.zeroth_order.modes import Draws, nothing
from sft.optim.zeroth_order.trained import Trained


class InplaceMode:
    """Moves the weights from where they stand to where they are asked for, in one pass.

    `standing` is where they stand; an optimizer that knows it can restore and update in one pass.
    Weights are rounded at each move, so they come back to w only up to rounding: in bf16 that
    drift is many times the updates. Magnitude masks are refused by the configuration: they would be
    read from displaced weights, and entries near the threshold would leave them between the sides.

    Args:
        trained: the trained set.
        kind: of the noise.
        after: called when the tensors have changed, to write them to where they are used.
    """

    def __init__(
        self, trained: Sequence[Trained], kind: str, after: Callable[[], None] = nothing
    ) -> None:
        self.standing: Draws = ()
        self._trained, self._kind, self._after = trained, kind, after

    def move(self, draws: Draws) -> None:
        """Let the model compute with about w - sum_q c_q z_q from now on; with () with about w."""
        way = dict(draws)
        for key, coefficient in self.standing:
            way[key] = way.get(key, 0.0) - coefficient
        steps = [(key, coefficient) for key, coefficient in way.items() if coefficient != 0]
        self.standing = tuple(draws)
        if steps:
            weights = [t.parameter.data for t in self._trained]
            displace(
                weights,
                [t.id for t in self._trained],
                steps,
                kind=self._kind,
                masks=[t.mask for t in self._trained],
                out=weights,
            )
            self._after()

    def settle(self) -> None:
        """Move back to about w."""
        self.move(())

    def close(self) -> None:
        """Settle for good."""
        self.settle()
