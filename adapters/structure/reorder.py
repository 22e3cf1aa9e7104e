"""Move the units of one group: pure index moves, no rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sft.adapters.structure.groups import CoupledGroup, Member
from sft.adapters.structure.layout import unwrapped


def reorder_(model: nn.Module, group: CoupledGroup, order: Tensor) -> None:
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
