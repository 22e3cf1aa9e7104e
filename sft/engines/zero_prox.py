"""The proximal step of a penalty over flat vectors that hold parts of what it shrinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.adapters.dynamics import Penalty
from sft.engines.zero_shards import ZeroShards
from sft.optim.prox import check_rules, shrink_


class ZeroShrinking:
    """Shrinks the entries that this process updates, after the optimizer has, until removed.

    Between the torch optimizer's step and the copy that ZeRO then makes for forward.

    Args:
        stock: the torch optimizer; it steps one flat vector after another.
        penalties: their strengths may change between steps.
        shards: know where the entries lie.
    """

    def __init__(self, stock: Any, penalties: Sequence[Penalty], shards: ZeroShards) -> None:
        check_rules(penalties)
        self._penalties, self._shards = penalties, shards
        self._handle = stock.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """End the shrinking."""
        self._handle.remove()

    def _after_step(self, stepped: Any, *_: Any) -> None:
        flats = {id(flat): group for group in stepped.param_groups for flat in group["params"]}
        for penalty in self._penalties:
            for parameter in penalty.parameters:
                held = self._shards.fragment(parameter)
                if held is not None and id(held.flat) in flats:
                    entries = held.of(held.flat.detach())
                    shrink_(stepped, flats[id(held.flat)]["lr"], [entries], penalty)
