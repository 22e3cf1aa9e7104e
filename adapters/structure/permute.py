"""Reorder coupled units in place, in every matrix that knows them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sft.adapters.config import require
from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.groups import CoupledGroup, Member
from sft.adapters.structure.layout import unwrapped


def permute_(model: nn.Module, orders: Mapping[str, Tensor]) -> None:
    """Bring unit order[i] of each named group to place i, in place and without rounding.

    Moves rows, columns, biases and side tensors together, so a model in eval mode computes the
    same function, up to the order of its sums. Permuting by `inverse(order)` restores every bit.

    Args:
        model: a bare base model, without adapters.
        orders: a permutation (num_units,) for each group to permute, by the group's name.

    Raises:
        ValueError: before anything moves: an unknown name, a group that can't be permuted, an
            order that its coupling forbids, a layer with an adapter, or a packed or sharded weight.
    """
    groups = {group.name: group for group in coupled_groups(model)}
    for name, order in orders.items():
        require(
            "orders", name, name in groups, f"the name of a group, such as {next(iter(groups))}"
        )
        _check(model, groups[name], order)
    for name, order in orders.items():
        apply_order_(model, groups[name], order)


def inverse(order: Tensor) -> Tensor:
    """Return the order that undoes this one."""
    return torch.argsort(order)


def front_order(group: CoupledGroup, units: Tensor) -> Tensor:
    """Return a legal order of all units that puts these in front, as they come.

    Raises:
        ValueError: the coupling allows none: some, not all, units of more than one block, say.
    """
    taken = torch.zeros(group.num_units, dtype=torch.bool)
    units = units.detach().cpu().long()
    taken[units] = True
    touched = torch.div(units, group.block_size, rounding_mode="floor")
    first = torch.zeros(group.num_units // group.block_size, dtype=torch.bool)
    first[touched] = True
    rest = (~taken).nonzero()[:, 0]
    # What remains of a block that was begun comes first.
    begun = first[torch.div(rest, group.block_size, rounding_mode="floor")]
    order = torch.cat([units, rest[begun], rest[~begun]])
    group.check_order(order)
    return order


def apply_order_(model: nn.Module, group: CoupledGroup, order: Tensor) -> None:
    """Reorder one group's units without any check; see `permute_`."""
    everything = torch.arange(group.num_units)
    for member in group.members:
        module = unwrapped(model.get_submodule(member.module))
        own, home = member.own_units(order.cpu()), member.own_units(everything)
        if member.listed:
            _reorder_list(module, member.parameter, own)
            continue
        source, target = member.rule.positions(own), member.rule.positions(home)
        axes = (member.axis,) if member.expert_axis is None else (member.expert_axis, member.axis)
        _move(getattr(module, member.parameter), axes, member, source, target)
        if member.bias is not None:
            bias = getattr(module, member.bias)
            _move(bias, tuple(range(bias.dim())), member, source, target)


def _move(
    tensor: Tensor, axes: tuple[int, ...], member: Member, source: Tensor, target: Tensor
) -> None:
    """Copy lines `source` of the axes' merged numbering to lines `target`."""
    with torch.no_grad():
        lines = tensor.movedim(axes, tuple(range(len(axes))))
        source, target = source.to(tensor.device), target.to(tensor.device)
        if len(axes) == 1:
            lines[target] = lines[source]
        else:
            lines[member.split(target)] = lines[member.split(source)]


def _reorder_list(modules: nn.Module, parameter: str, own: Tensor) -> None:
    """Reorder the tensors of a ModuleList with one entry a unit."""
    tensors = [getattr(entry, parameter) for entry in modules.children()]
    with torch.no_grad():
        moved = torch.stack(tensors)[own.to(tensors[0].device)]
        for tensor, values in zip(tensors, moved, strict=True):
            tensor.copy_(values)


def _check(model: nn.Module, group: CoupledGroup, order: Tensor) -> None:
    require(
        f"orders[{group.name!r}]",
        "a group that can't be permuted",
        group.permutable,
        f"a permutable group: {group.reason}; remedy: use the index layout",
    )
    group.check_order(order)
    for member in group.members:
        module = model.get_submodule(member.module)
        wrapped = unwrapped(module) is not module
        require(
            member.module,
            "a layer with an adapter" if wrapped else "a layer",
            not wrapped,
            "a bare layer; remedy: permute the base model before adapters are injected",
        )
        if member.listed:
            continue
        tensor = getattr(module, member.parameter)
        packed = tensor.shape[member.axis] != member.extent or not tensor.is_floating_point()
        require(
            f"{member.module}.{member.parameter}",
            f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            not packed and not hasattr(tensor, "placements"),
            f"a whole, unpacked weight with {member.extent} entries on axis {member.axis}; "
            "remedy: use the index layout",
        )
