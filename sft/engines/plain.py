"""Whole parameters in every process, stepped by a torch optimizer: one process, or DDP."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.dynamics import Penalty, SupportChange
from sft.adapters.ranks import ALONE, Ranks
from sft.engines.engine import Removable
from sft.gradient_scale import GradientScale
from sft.optim.move import move_state
from sft.optim.prox import attach
from sft.updates import check_per_layer


class PlainEngine:
    """The engine of a Trainer that shards nothing.

    Args:
        optimizer: the Trainer's, wrapped by accelerate.
        ranks: the processes that train together.
    """

    consolidates = False

    def __init__(self, optimizer: Any, ranks: Ranks = ALONE) -> None:
        self.name = "plain" if ranks.count == 1 else "ddp"
        self.ranks = ranks
        self._optimizer = optimizer
        self._scale: GradientScale | None = None

    @property
    def stock(self) -> Any:
        """The torch optimizer that steps, without accelerate's wrapper."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def check(self, tuner: SparseTuner) -> None:
        """Raise on per-layer updates that nobody makes."""
        check_per_layer(tuner, self._optimizer)

    def check_staged(self) -> None:
        """A torch optimizer can always begin anew."""

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Probe one entry of the gradient in backward, and where it is applied."""
        self._scale = GradientScale(parameters, self.ranks)

    def gradient_scale(self) -> float:
        """Return by how much backward's gradients exceed those applied; 0 for a skipped update."""
        found = 1.0 if self._scale is None else self._scale.read()
        return 0.0 if getattr(self._optimizer, "step_was_skipped", False) else found

    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """There are no copies."""

    def move(self, change: SupportChange) -> None:
        """Move the optimizer's state of a parameter by index."""
        move_state(
            self.stock,
            change.parameter,
            change.source,
            dim=change.dim,
            mean_grad=change.mean_grad,
            mean_square=change.mean_square,
            updates=change.updates,
        )

    def begin_anew(self) -> None:
        """Drop the optimizer's state."""
        self.stock.state.clear()

    def accumulators(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """Return SM3's accumulators."""
        found: tuple[Tensor, Tensor] | None = self.stock.accumulators(parameter)
        return found

    def keeps_accumulators(self) -> bool:
        """Tell whether the optimizer is SM3."""
        return hasattr(self.stock, "accumulators")

    def shrink(self, penalties: list[Penalty]) -> Removable:
        """Shrink in the optimizer's step."""
        return attach(self.stock, penalties)

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """They are whole anyway."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the Trainer saves the optimizer by itself."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing was saved."""

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each group of the optimizer."""
        return [list(group["params"]) for group in self.stock.param_groups]

    def close(self) -> None:
        """Stop listening to backward."""
        if self._scale is not None:
            self._scale.close()
        self._scale = None
