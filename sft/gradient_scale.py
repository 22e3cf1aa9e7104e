"""By what factor the gradients of backward exceed those the optimizer applies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sft.adapters.ranks import ALONE, Ranks


class GradientScale:
    """Compares one entry's gradient as backward gave it with the same entry when it is applied.

    Between the two lie the mean over the ranks, and loss scaling and clipping by norm, which
    multiply every gradient by one factor. Gradients read in backward (SpIEL's windows) are divided
    by it, so that a grown weight starts with moments on the scale of its neighbours'. Clipping
    entry by entry has no such factor.

    Args:
        parameters: trained parameters; the probe is the entry of largest gradient in whichever
            backward reaches first.
        ranks: backward's gradient is the mean over theirs. With several of them all entries of the
            probe are kept: which one is largest shows in the mean alone.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks = ALONE) -> None:
        parameters = list(parameters)
        self._ranks = ranks
        self._number = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._probe: nn.Parameter | None = None
        self._slot: Tensor | None = None
        self._sum: Tensor | None = None
        self._hooks = [_hooked(p, partial(self._observe, p)) for p in parameters]

    def _observe(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self._probe is None:
            self._probe = parameter
            if self._ranks.count == 1:
                self._slot = gradient.detach().flatten().abs().argmax()
        if self._probe is not parameter:
            return
        # autograd may make this very tensor the parameter's grad, which clipping changes in place
        entry = gradient.detach().flatten()[... if self._slot is None else self._slot].clone()
        self._sum = entry if self._sum is None else self._sum + entry

    @property
    def probe(self) -> nn.Parameter | None:
        """The parameter that is compared, once backward has reached it."""
        return self._probe

    def read(self, applied: Tensor | None = None) -> float:
        """Return the factor of the update just made, and start anew.

        It is exactly 1 when nothing was scaled or clipped, and 1 when the probe has no gradient.

        Args:
            applied: the gradient of the probe that was applied; by default the one still in place.
        """
        raw, slot, probe = self._sum, self._slot, self._probe
        self._sum = self._slot = self._probe = None
        if self._ranks.count > 1:
            raw, slot = self._mean(raw, probe)
        if applied is None and probe is not None:
            applied = probe.grad
        if raw is None or slot is None or applied is None:
            return 1.0
        entry = applied.flatten()[slot]
        usable = torch.isfinite(raw) and torch.isfinite(entry) and raw != 0 and entry != 0
        return float(raw / entry) if usable else 1.0

    def _mean(
        self, raw: Tensor | None, probe: nn.Parameter | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the largest entry of the ranks' mean, and where it is."""
        number = self._number[id(probe)] if probe is not None else len(self._number)
        self._ranks.check_alike("the parameter that backward reaches first", number)
        if raw is None:
            return None, None
        mean = self._ranks.mean(raw)
        slot = mean.abs().argmax()
        return mean[slot], slot

    def close(self) -> None:
        """Stop listening to backward."""
        for hook in self._hooks:
            hook.remove()


def _hooked(parameter: nn.Parameter, observe: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_hook(observe)  # type: ignore[no-untyped-call]
    return handle
