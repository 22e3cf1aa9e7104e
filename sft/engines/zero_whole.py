"""A torch optimizer over whole stand-ins for parameters that ZeRO keeps flat and in parts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sft.engines.zero_shards import ZeroShards
from sft.optim.move import MovesOwnState


class WholeOptimizer:
    """What the optimizer would be without ZeRO, for a moment: read it, change it, `put_back`.

    Collective to make.

    Args:
        shards: what ZeRO holds.
        parameters: some of those it trains, or None for all.
        device: where the whole state lies.
    """

    def __init__(
        self,
        shards: ZeroShards,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        self._shards = shards
        chosen = None if parameters is None else {id(p) for p in parameters}
        self.stand_ins: dict[int, Tensor] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        groups, state = [], {}
        for group, held in shards.groups:
            wanted = [p for p in held if chosen is None or id(p) in chosen]
            for parameter in wanted:
                stand_in = shards.value(parameter).to(device)
                self._parameters[id(parameter)] = parameter
                self.stand_ins[id(parameter)] = stand_in
                state[stand_in] = _on(device, shards.state(parameter))
            groups.append({**group, "params": [self.stand_ins[id(p)] for p in wanted]})
        self.optimizer = _like(shards.stock, groups, state)

    def names(self, names: dict[int, str]) -> dict[int, str]:
        """Return the names of the stand-ins by identity, given those of the parameters."""
        return {id(stand_in): names[key] for key, stand_in in self.stand_ins.items()}

    def put_back(self) -> None:
        """Write the state, not the values, and the groups' numbers back; collective."""
        for key, parameter in self._parameters.items():
            self._shards.put_state(parameter, self.optimizer.state[self.stand_ins[key]])
        for (group, _), changed in zip(
            self._shards.groups, self.optimizer.param_groups, strict=True
        ):
            group.update({key: value for key, value in changed.items() if key != "params"})


def _on(device: Any, state: dict[str, Any]) -> dict[str, Any]:
    if device is None:
        return state
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in state.items()}


def _like(stock: Any, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Any:
    """Return an optimizer of these groups and states; ours know how to move them by themselves."""
    if isinstance(stock, MovesOwnState):
        made: Any = copy.copy(stock)
    else:
        made = torch.optim.SGD([torch.empty(0)], lr=0.0)
    made.param_groups, made.state = groups, state
    return made
