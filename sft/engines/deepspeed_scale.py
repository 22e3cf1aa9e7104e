"""By what factor backward's gradients exceed those that DeepSpeed applies inside of backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.ranks import Ranks
from sft.engines.zero_shards import Fragment
from sft.gradient_scale import GradientScale


class DeepSpeedScale:
    """A `GradientScale` that notes the probe's gradient when the torch optimizer steps.

    After that it is gone: DeepSpeed's step is part of backward. Its order of unscaling and clipping
    is not computed here once more, as it differs from stage to stage.

    Args:
        parameters: trained parameters.
        ranks: the processes.
        stock: the torch optimizer that steps.
        fragment: returns which entries of a parameter lie in a flat vector of this process; None
            where the optimizer steps the parameters themselves.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        ranks: Ranks,
        stock: Any,
        fragment: Callable[[nn.Parameter], Fragment | None] | None = None,
    ) -> None:
        self._ranks = ranks
        self._fragment = fragment
        self._scale = GradientScale(parameters, ranks)
        self._noted: Tensor | None = None
        self._handle = stock.register_step_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        probe = self._scale.probe
        if probe is None:
            return
        if self._fragment is None:
            self._noted = None if probe.grad is None else probe.grad.detach().clone()
            return
        if self._noted is None:
            shape = getattr(probe, "ds_shape", probe.shape)
            self._noted = torch.zeros(shape, dtype=torch.float32, device=probe.device)
        held = self._fragment(probe)
        # it steps one flat vector after another
        if held is not None and held.flat.grad is not None:
            entries = held.of(held.flat.grad)
            self._noted.view(-1)[held.first : held.first + held.size] = entries

    def read(self) -> float:
        """Return the factor of the update just made, and start anew."""
        noted, self._noted = self._noted, None
        if self._fragment is not None and noted is not None:
            noted = self._ranks.mean(noted) * self._ranks.count  # each holds some of the entries
        return self._scale.read(noted)

    def close(self) -> None:
        """Stop listening."""
        self._handle.remove()
        self._scale.close()
