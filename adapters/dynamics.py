"""What a method that changes or constrains its adapter while training tells its driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sft.adapters.ranks import Ranks

Accumulators = Callable[[nn.Parameter], "tuple[Tensor, Tensor] | None"]


@dataclass(frozen=True)
class SupportChange:
    """One parameter's slots after a reselection, or after some of them left.

    Args:
        name: the module.
        parameter: the values, already in their new shape; the object stays.
        source: int64, one for each slot along `dim`: the old slot it comes from, or -1 where
            freshly grown. Shorter than before where slots left for good.
        mean_grad: (k,) float32, mean gradient per update over the window, read where source is -1.
        mean_square: (k,) float32, mean squared gradient, likewise.
        updates: number of updates the means are over; 0 if there are none.
    """

    name: str
    parameter: nn.Parameter
    source: Tensor
    mean_grad: Tensor | None = None
    mean_square: Tensor | None = None
    updates: int = 0
    dim: int = 0


@dataclass(eq=False)
class Penalty:
    """An l1 penalty whose proximal step follows each optimizer step; its strength may change.

    Args:
        parameters: what it acts on, entry by entry.
        strength: lambda.
        rule: "soft" for the exact proximal operator, "reference" for the one of SoRA's authors.
        times_lr: the threshold is learning rate * lambda, as in proximal gradient descent; else
            lambda itself.
    """

    parameters: list[nn.Parameter]
    strength: float
    rule: str = "soft"
    times_lr: bool = True


class Dynamics(Protocol):
    """Drives the changes of one adapter. Steps count completed optimizer updates.

    `reads_gradients` tells whether `after_gradients` needs the scale of backward's gradients;
    `reads_accumulators` whether `after_update` needs row and column accumulators. `one_process` is
    None, or what to say to someone who runs several: "key: why not; remedy". `ranks` are the
    processes that train together; the driver sets them.
    """

    reads_gradients: bool
    reads_accumulators: bool
    one_process: str | None
    ranks: Ranks

    def before_update(self, step: int, micro_batches: int) -> None:
        """Prepare for update `step + 1`, made of so many backward passes."""

    def after_gradients(self, scale: float) -> None:
        """Take note that the gradients of an update are whole.

        Those read in backward are `scale` times what the optimizer applied: loss scaling and
        clipping lie between. A scale of 0 means that the update is skipped, its gradients void.
        """

    def after_update(self, step: int, accumulators: Accumulators) -> list[SupportChange]:
        """Return what changed after update `step`; the supports are in place already."""

    def metrics(self) -> dict[str, float]:
        """Return what the training log shows beside the loss."""

    def close(self) -> None:
        """Stop listening to backward: the training has ended, perhaps inside a window."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors an interrupted run needs to continue."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of `state` back."""
