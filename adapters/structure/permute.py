"""Reorder coupled units in place, in every matrix that knows them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sft.adapters.config import require
from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.groups import CoupledGroup, Member
from sft.adapters.structure.layout import unwrapped
from sft.adapters.structure.reorder import reorder_


def permute_(model: nn.Module, orders: Mapping[str, Tensor]) -> None:
    """Bring unit order[i] of each named group to place i, in place and without rounding.

    Moves rows, columns, biases and side tensors together, so a model in eval mode computes the
    same function, up to the order of its sums. Permuting by `inverse(order)` restores every bit;
    of groups that share matrices (heads and v-o dimensions), undo the last permuted first.

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
        reorder_(model, groups[name], order)


def inverse(order: Tensor) -> Tensor:
    """Return the order that undoes this one."""
    return torch.argsort(order)


def front_order(group: CoupledGroup, units: Tensor) -> Tensor:
    """Return a legal order of all units whose first len(units) are these, as a set.

    Blocks chosen whole come first, then the one chosen in part.

    Raises:
        ValueError: the coupling allows none: parts of two blocks are chosen, say.
    """
    chosen = torch.zeros(group.num_units, dtype=torch.bool)
    chosen[units.detach().cpu().long()] = True
    in_blocks = chosen.view(-1, group.block_size)
    by_count = in_blocks.sum(1)
    if group.blocks_move:
        block_order = by_count.argsort(descending=True, stable=True)
    else:
        block_order = torch.arange(len(by_count))
    inside = in_blocks.int().argsort(dim=1, descending=True, stable=True)
    order = (inside + torch.arange(len(by_count))[:, None] * group.block_size)[block_order]
    order = order.flatten()
    count = int(chosen.sum())
    require(
        f"units of {group.name}",
        sorted(units.tolist()),
        bool(chosen[order[:count]].all()),
        f"whole blocks of {group.block_size} ({group.block_meaning}) and part of one more; "
        "remedy: choose whole blocks, or use the index layout",
    )
    return order


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
        tensor = getattr(module, member.parameter, None)
        require(
            f"{member.module}.{member.parameter}",
            _describe(tensor),
            tensor is not None and _is_plain(tensor, member),
            f"a whole, unpacked weight with {member.extent} entries on axis {member.axis}; "
            "remedy: use the index layout",
        )


def _describe(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _is_plain(tensor: Tensor, member: Member) -> bool:
    """Tell whether a tensor is neither packed, nor scaled by block (8 bits), nor sharded."""
    whole = tensor.dim() > member.axis and tensor.shape[member.axis] == member.extent
    wide = tensor.is_floating_point() and tensor.element_size() >= 2
    return whole and wide and not hasattr(tensor, "placements")
