"""What a structured method chooses from: the units of each trained matrix, by group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sft.adapters.geometry import features, layer_kind
from sft.adapters.structure.layout import unwrapped

if TYPE_CHECKING:
    from sft.adapters.structure.groups import CoupledGroup, Member

CONSUMERS = ("o", "down")
PRODUCERS = ("q", "k", "v", "gate", "up")
LOOSE = "any"  # input features of a module that belongs to no known structure
ROLES = (*PRODUCERS, *CONSUMERS, LOOSE)
ATTENTION_UNITS = ("heads", "channels", "vo_channels")


@dataclass(frozen=True, eq=False)
class Slot:
    """The units of one matrix in one role.

    Args:
        role: one of `ROLES`.
        module: path of the matrix's module.
        side: "in" if units are input features of the matrix, "out" if output features.
        table: (units, features of a unit) int64, the features of each unit on that side.
        line: entries of the weight that belong to one feature.
        shared: how many units of the group share one unit of this matrix: the query heads of a
            key-value head.
    """

    role: str
    module: str
    side: str
    table: Tensor
    line: int
    shared: int = 1

    @property
    def num_units(self) -> int:
        """Units to choose from."""
        return self.table.shape[0]

    @property
    def unit_weights(self) -> int:
        """Weights of one unit."""
        return self.table.shape[1] * self.line

    @property
    def shape(self) -> tuple[int, int]:
        """(features, entries of each) of all units together."""
        return self.table.numel(), self.line

    def own(self, ranking: Tensor) -> Tensor:
        """Return the matrix's own units in the order in which the group's units first name them."""
        if self.shared == 1:
            return ranking
        named = torch.div(ranking, self.shared, rounding_mode="floor")
        return torch.tensor(list(dict.fromkeys(named.tolist())), dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Slots whose units are ranked together, and the consumer that scores them.

    Args:
        name: of the coupled group, or of the module.
        kind: groups of one kind may share a pool.
        consumer: path of the module whose input features are the units.
        table: (units, features of a unit) int64, the features of each unit there.
        slots: the trained matrices.
        coupled: the whole group that the slots belong to, if the units are its units.
    """

    name: str
    kind: str
    consumer: str
    table: Tensor
    slots: tuple[Slot, ...]
    coupled: CoupledGroup | None = None

    @property
    def num_units(self) -> int:
        """Units to rank."""
        return self.table.shape[0]


def unit_groups(
    model: nn.Module, groups: Iterable[CoupledGroup], roles: Sequence[str], attention_unit: str
) -> list[UnitGroup]:
    """Return the groups in which a role is trained, in the order of the model.

    Args:
        model: the base model, for the shapes of its modules.
        groups: its coupled groups.
        roles: which matrices are trained.
        attention_unit: "heads"; "vo_channels", dimensions that v and o share; or "channels", single
            input features of o.

    Raises:
        ValueError: a role that the model does not have in this form.
    """
    groups = list(groups)
    wanted = {
        "channels",
        "expert_channels",
        "vo_channels" if attention_unit == "vo_channels" else "heads",
    }
    found = []
    for group in groups:
        members = [m for m in (*group.producers, *group.consumers) if m.role in roles]
        if group.kind not in wanted or not members:
            continue
        loose = group.kind == "heads" and attention_unit == "channels"
        build = _single_features if loose else _coupled
        found.append(build(model, group, members))
    _check_roles(found, groups, roles)
    return found


def loose_group(module: str, base: nn.Module) -> UnitGroup:
    """Return a module of no known structure as a consumer, each input feature a unit."""
    inputs, outputs = features(base)
    table = torch.arange(inputs)[:, None]
    slot = Slot(LOOSE, module, "in", table, outputs)
    return UnitGroup(module, f"{LOOSE} of {inputs}", module, table, (slot,))


def _coupled(model: nn.Module, group: CoupledGroup, members: list[Member]) -> UnitGroup:
    everything = torch.arange(group.num_units)
    slots = []
    for member in members:
        own = member.own_units(everything)
        slots.append(_slot(model, member, member.rule.positions(own).view(len(own), -1)))
    consumer = group.consumers[0]
    table = consumer.positions(everything).view(group.num_units, -1)
    return UnitGroup(group.name, group.kind, consumer.module, table, tuple(slots), group)


def _single_features(model: nn.Module, group: CoupledGroup, members: list[Member]) -> UnitGroup:
    (consumer,) = members
    everything = consumer.positions(torch.arange(group.num_units))
    table = everything.sort().values[:, None]
    slot = _slot(model, consumer, table)
    return UnitGroup(group.name, "features", consumer.module, table, (slot,))


def _slot(model: nn.Module, member: Member, table: Tensor) -> Slot:
    base = unwrapped(model.get_submodule(member.module))
    if layer_kind(base) is None:
        raise ValueError(
            f"roles: got {member.role!r}, but {member.module!r} is a {type(base).__name__}, which "
            "no layer can stand around; leave the role out, such as by roles=['o']"
        )
    inputs, outputs = features(base)
    side = "out" if member.role in PRODUCERS else "in"
    line = inputs if side == "out" else outputs
    return Slot(member.role, member.module, side, table, line, member.shared)


def _check_roles(found: list[UnitGroup], groups: list[CoupledGroup], roles: Sequence[str]) -> None:
    present = {slot.role for group in found for slot in group.slots}
    experts = {m.role: g for g in groups if g.kind == "expert_channels" for m in g.producers}
    for role in roles:
        if role in experts:
            raise ValueError(
                f"roles: got {role!r}, which the experts of {experts[role].name!r} keep fused in a "
                "3-D parameter; of these only the consumer is trained, set roles=['o', 'down']"
            )
        if role not in present and role != LOOSE:
            known = sorted({m.role for g in groups for m in (*g.producers, *g.consumers)})
            raise ValueError(
                f"roles: got {role!r}, which this model lacks in units of the attention_unit asked "
                f"for, allowed are roles among {', '.join(known)}; or set attention_unit='heads'"
            )
