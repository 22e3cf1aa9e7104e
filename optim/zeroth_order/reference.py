"""The perturbations of MeZO's authors, for comparison with their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sft.optim.zeroth_order.modes import Draws, nothing
from sft.optim.zeroth_order.trained import Trained


class ReferenceMode:
    """w + eps z, then - 2 eps z, then + eps z, each rounded, z from torch's generator.

    One such cycle changes the last bit of nearly half of the weights, and z depends on the device
    and on the order of the parameters: see `ExactMode` for what to train with.

    Args:
        trained: the trained set; z is drawn in this order.
        eps: size of the perturbation; every move is a multiple of it.
        after: called when the tensors have changed, to write them to where they are used.

    Source: MeZO, arXiv 2305.17333, Algorithm 1 (PerturbParameters).
    """

    def __init__(
        self, trained: Sequence[Trained], eps: float, after: Callable[[], None] = nothing
    ) -> None:
        self.standing: Draws = ()
        self._trained, self._eps, self._after = trained, eps, after

    def move(self, draws: Draws) -> None:
        """Add the multiple of eps z that leads from where the weights stand to w - c z."""
        ((key, _),) = draws or self.standing or ((0, 0.0),)
        factor = (_coefficient(self.standing) - _coefficient(draws)) / self._eps
        self.standing = tuple(draws)
        if factor != 0:
            for weight, z in reference_noise(self._trained, key):
                weight.copy_(weight + factor * z * self._eps)
            self._after()

    def settle(self) -> None:
        """Move back to about w."""
        self.move(())

    def close(self) -> None:
        """Settle for good."""
        self.settle()

    def update(self, key: int, gradient: float, rates: Sequence[tuple[float, float]]) -> None:
        """Take the step w - lr (g z + weight_decay w).

        Args:
            key: seed of z.
            gradient: the projected gradient g.
            rates: learning rate and weight decay of each tensor of the trained set.
        """
        noise = reference_noise(self._trained, key)
        for (weight, z), (lr, decay) in zip(noise, rates, strict=True):
            step = gradient * z + decay * weight if decay else gradient * z
            weight.copy_(weight - lr * step)


def reference_noise(trained: Sequence[Trained], key: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of the trained set with its z, normal, in the tensor's own dtype."""
    device = trained[0].parameter.device
    generator = torch.Generator(device).manual_seed(key % 2**63)
    for t in trained:
        weight = t.parameter.data
        shape, dtype = weight.shape, weight.dtype
        yield weight, torch.normal(0.0, 1.0, shape, generator=generator, dtype=dtype, device=device)


def _coefficient(draws: Draws) -> float:
    return sum(coefficient for _, coefficient in draws)
