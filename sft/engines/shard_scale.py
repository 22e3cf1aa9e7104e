"""By what factor the gradients of backward exceed those applied, where both are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sft.adapters.ranks import Ranks
from sft.optim.shards import local


class ShardScale:
    """Compares one entry's gradient as it was reduced with the same entry when it is applied.

    As `sft.gradient_scale`, but backward reaches no parameter that is a shard: FSDP fills in its
    gradient. Every rank probes a shard of its own, and all take the answer of the first that has
    one, so that the factor is the same.

    Args:
        parameters: trained and sharded.
        ranks: the processes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        self._probe: Tensor | None = None
        self._slot = 0
        self._raw = math.nan
        self._hooks = [_hooked(parameter, self._observe) for parameter in parameters]

    def _observe(self, parameter: Tensor) -> None:
        if self._probe is not None and self._probe is not parameter:
            return
        assert parameter.grad is not None
        gradient = local(parameter.grad).flatten()
        if not gradient.numel():
            return
        if self._probe is None:
            self._probe, self._slot = parameter, int(gradient.abs().argmax())
        self._raw = float(gradient[self._slot])

    def read(self) -> float:
        """Return the factor of the update whose gradients are still in place, and start anew.

        It is exactly 1 when nothing was scaled or clipped, and 1 when no probe has a gradient.
        """
        raw, applied, probe = self._raw, math.nan, self._probe
        self._probe, self._raw = None, math.nan
        if probe is not None and probe.grad is not None:
            applied = float(local(probe.grad).flatten()[self._slot])
        for one, other in self._ranks.gather([raw, applied]):
            if math.isfinite(one) and math.isfinite(other) and one != 0 and other != 0:
                return one / other
        return 1.0

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()


def _hooked(parameter: nn.Parameter, observe: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(observe)  # type: ignore[no-untyped-call]
    return handle
