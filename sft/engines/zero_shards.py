"""What ZeRO holds of trained parameters: fp32 masters and optimizer state, flat and in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sft.adapters.gathered import gathered


class Fragment(NamedTuple):
    """The entries of a parameter that this process updates.

    Args:
        flat: the fp32 vector of many parameters that the optimizer steps.
        start: where the entries begin in it.
        first: the first of them in the flattened parameter.
        size: how many.
    """

    flat: Tensor
    start: int
    first: int
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the entries in a tensor laid out as `flat`; no copy."""
        return flat.narrow(0, self.start, self.size)


class ZeroShards:
    """Reads and writes whole masters and states by parameter.

    All verbs but `fragment` and `flats` are collective.

    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._third = hasattr(zero, "fp32_partitioned_groups_flat")

    @property
    def stock(self) -> Any:
        """The torch optimizer, which steps flat vectors."""
        return self._zero.optimizer

    @property
    def groups(self) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
        """Each group of the optimizer, and the parameters that lie in its flat vectors."""
        groups = self.stock.param_groups
        if not self._third:
            return [(g, list(p)) for g, p in zip(groups, self._zero.bit16_groups, strict=True)]
        found: list[tuple[dict[str, Any], list[nn.Parameter]]] = [(group, []) for group in groups]
        for i, parameters in enumerate(self._zero.fp16_groups):
            found[self._zero.sub_group_to_group_id[i]][1].extend(parameters)
        return found

    def group(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the group of a parameter."""
        return next(g for g, held in self.groups if any(p is parameter for p in held))

    def flat(self, parameter: nn.Parameter) -> Tensor:
        """Return this process's flat vector that belongs to the group of a parameter."""
        found: Tensor = self._flats[self._index(parameter)]
        return found

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Return the entries of a parameter that this process updates, or None."""
        if not self._third:
            held: Any = getattr(parameter, "_hp_mapping", None)
            if held is None:
                return None
            start, count = held.hp_fragment_address.start, held.hp_fragment_address.numel
            return Fragment(self.flat(parameter), start, held.lp_fragment_address.start, count)
        zero, sharded = self._zero, parameter
        _, start, padded = zero.grad_position[zero.get_param_id(sharded)]
        first = padded * torch.distributed.get_rank(group=_group(sharded))
        count = min(padded, sharded.ds_numel - first)  # type: ignore[attr-defined]
        return Fragment(self.flat(sharded), start, first, count) if count > 0 else None

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return the fp32 master, whole."""
        return self._gathered(parameter, self.flat(parameter).detach())

    @torch.no_grad()
    def put_value(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write the master, and the copy that forward reads."""
        value = value.to(parameter.device)
        self._put(parameter, self.flat(parameter), value)
        with gathered([parameter]):
            parameter.copy_(value)

    @torch.no_grad()
    def adopt(self, parameter: nn.Parameter) -> None:
        """Take what forward reads for the master."""
        with gathered([parameter]):
            self._put(parameter, self.flat(parameter), parameter.detach())

    def keys(self, parameter: nn.Parameter) -> list[str]:
        """Return the names of the state that has an entry for each of the parameter's."""
        flat = self.flat(parameter)
        state = self.stock.state.get(flat, {})
        return [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape]

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer's state of a parameter, whole; empty before the first step."""
        kept = self.stock.state.get(self.flat(parameter), {})
        found = dict(kept)
        for key in self.keys(parameter):
            found[key] = self._gathered(parameter, kept[key])
        return found

    def put_state(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Write what `state` returned; numbers are those of all that lie in one flat vector."""
        keys, kept = self.keys(parameter), self.stock.state.get(self.flat(parameter), {})
        for key, value in state.items():
            if key in keys:
                self._put(parameter, kept[key], value)
            elif isinstance(value, Tensor) and isinstance(kept.get(key), Tensor):
                kept[key].copy_(value)
            else:
                kept[key] = value.item() if isinstance(value, Tensor) else value

    def make_states(self) -> None:
        """Let the optimizer make its state, by a step of no gradient at a learning rate of 0."""
        options = [dict(group) for group in self.stock.param_groups]
        for group in self.stock.param_groups:
            group.update({key: 0.0 for key in ("lr", "weight_decay") if key in group})
        for i, flat in enumerate(self._flats):
            kept = flat.grad
            flat.grad = torch.zeros_like(flat)
            self._zero._optimizer_step(i)  # as its own step does, one flat vector after another
            flat.grad = kept
        for group, before in zip(self.stock.param_groups, options, strict=True):
            group.update({key: before[key] for key in ("lr", "weight_decay") if key in before})

    def _put(self, parameter: nn.Parameter, flat: Tensor, whole: Tensor) -> None:
        held = self.fragment(parameter)
        if held is not None:
            held.of(flat).copy_(whole.reshape(-1)[held.first : held.first + held.size])

    def _gathered(self, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        # not by DeepSpeed's functions of this purpose (0.19): in stages 1 and 2 they find state of
        # the first group alone, in stage 3 they write no parameter whose last part is shorter
        held, shape = self.fragment(parameter), getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape, dtype=flat.dtype, device=parameter.device)
        if held is not None:
            whole.view(-1)[held.first : held.first + held.size] = held.of(flat)
        torch.distributed.all_reduce(whole, group=_group(parameter))  # the others' entries are 0
        return whole

    @property
    def _flats(self) -> Sequence[Tensor]:
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._third else None
        return flats if self._third else zero.single_partition_of_fp32_groups  # type: ignore[return-value]

    def _index(self, parameter: nn.Parameter) -> int:
        zero = self._zero
        if self._third:
            return int(zero.grad_position[zero.get_param_id(parameter)][0])
        held = enumerate(zero.bit16_groups)
        return next(i for i, group in held if any(p is parameter for p in group))


def trained(shards: ZeroShards) -> Iterator[nn.Parameter]:
    """Yield all parameters that the optimizer steps."""
    for _, parameters in shards.groups:
        yield from parameters


def _group(parameter: Any) -> Any:
    """Return the processes that share a parameter's state."""
    return getattr(parameter, "ds_process_group", None) or parameter._dp_group
