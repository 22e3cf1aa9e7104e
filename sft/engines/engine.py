"""What the driver of a sparse method asks of the engine under a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.dynamics import Penalty, SupportChange
from sft.adapters.ranks import Ranks


class Removable(Protocol):
    """Something that stays until it is removed."""

    def remove(self) -> None:
        """End it."""


class Engine(Protocol):
    """Holds a run's parameters, gradients and optimizer state, whole or in shards.

    All verbs but `check`, `watch` and `close` may be collective: every rank calls them, in the same
    order.
    """

    name: str
    consolidates: bool  # checkpoints hold `state`, written by us, in place of the engine's own
    ranks: Ranks

    def check(self, tuner: SparseTuner) -> None:
        """Raise ValueError on what cannot run under this engine: key, reason, nearest setting."""

    def check_staged(self) -> None:
        """Raise ValueError unless optimizer and schedule can begin anew in mid-run."""

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin to note by how much backward's gradients exceed those that are applied."""

    def gradient_scale(self) -> float:
        """Return that factor for the update just made; 0 if it was skipped, 1 if not watched.

        Backward's gradients are the means over the ranks; between them and those that the optimizer
        applies lie loss scaling and clipping by norm.
        """

    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Bring every copy of these parameters along: they were written to outside of a step."""

    def move(self, change: SupportChange) -> None:
        """Move the optimizer's state of a parameter by index, and publish its values."""

    def begin_anew(self) -> None:
        """Let the optimizer forget all it has gathered."""

    def accumulators(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """Return SM3's row and column accumulators of a parameter, or None."""

    def keeps_accumulators(self) -> bool:
        """Tell whether the optimizer keeps such accumulators."""

    def shrink(self, penalties: list[Penalty]) -> Removable:
        """Apply the proximal steps of penalties after each step, until removed."""

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """In the block, let these parameters be whole and readable on every rank."""

    def state(self) -> dict[str, Tensor]:
        """Return optimizer state and fp32 values by name, whole; the same on any world size."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of `state` back."""

    @property
    def stock(self) -> Any:
        """The torch optimizer that steps, without wrappers."""

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each group of the optimizer, in their own shapes."""

    def close(self) -> None:
        """Stop listening to backward: the training has ended."""
