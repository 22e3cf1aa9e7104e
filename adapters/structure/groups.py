"""Coupled units: which matrices share a head or a channel, and where each unit lies in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sft.adapters.config import require

GroupKind = Literal["heads", "channels", "vo_channels", "expert_channels"]
Role = Literal["q", "k", "v", "o", "gate", "up", "down", "side"]


@dataclass(frozen=True, kw_only=True)
class IndexRule:
    """Where unit u lies on an axis.

    positions(u) = offset + (u // per_block) * block_stride + (u % per_block) * stride
                   + {0, step, ..., (size - 1) * step}

    Args:
        size: positions of one unit.
        stride: from one unit to the next inside a block.
        offset: position of unit 0.
        step: from one position of a unit to its next.
        per_block: units in a block; None if all units follow one another.
        block_stride: from one block to the next.
    """

    size: int
    stride: int
    offset: int = 0
    step: int = 1
    per_block: int | None = None
    block_stride: int = 0

    def positions(self, units: Tensor) -> Tensor:
        """Return the (len(units) * size,) positions of these units, unit after unit."""
        units = units.long()
        if self.per_block is None:
            start = self.offset + units * self.stride
        else:
            block = torch.div(units, self.per_block, rounding_mode="floor")
            start = self.offset + block * self.block_stride + units % self.per_block * self.stride
        reach = torch.arange(self.size, device=units.device) * self.step
        return (start[:, None] + reach).flatten()


@dataclass(frozen=True, kw_only=True)
class Member:
    """One matrix of a group in one role, or a tensor beside it (role "side").

    A fused matrix (qkv_proj, gate_up_proj) is a member once a role, with the role's own offset.

    Args:
        role: "q", "k", "v", "gate", "up" (producers), "o", "down" (consumers) or "side".
        module: path of the module in the base model, without ".base_layer".
        parameter: name of its parameter: "weight", or "down_proj" of a module of 3-D experts.
        axis: axis of the *stored* tensor on which the units lie. A Linear stores (out, in), a
            Conv1D (in, out).
        extent: length of that axis.
        rule: where each unit lies on it.
        expert_axis: axis of the experts in a 3-D parameter, else None. Positions then count
            through the experts, position = expert * extent + index on `axis`; see `split`.
        bias: name of the bias that moves with the units, on the same module; its last axis is the
            units'. None for consumers: their bias belongs to the hidden features.
        shared: how many units of the group share one unit of this member: the query heads of a
            key-value head for k and v under grouped-query attention, else 1.
        listed: the module is a ModuleList with one tensor a unit, all of which move.
    """

    role: Role
    module: str
    parameter: str
    axis: int
    extent: int
    rule: IndexRule
    expert_axis: int | None = None
    bias: str | None = None
    shared: int = 1
    listed: bool = False

    def positions(self, units: Tensor) -> Tensor:
        """Return where these units of the *group* lie on the stored axis, unit after unit.

        Where several units of the group share one of the member's (k and v under grouped-query
        attention), it counts once, at its first appearance.

        Args:
            units: (n,) unit numbers of the group.

        Returns:
            (n * rule.size,) int64, in the order of `units`; shorter where units are shared.
        """
        return self.rule.positions(self.own_units(units))

    def own_units(self, units: Tensor) -> Tensor:
        """Return the member's own unit numbers (its key-value heads, say) of the group's units."""
        units = units.long()
        if self.shared == 1:
            return units
        own = torch.div(units, self.shared, rounding_mode="floor")
        return torch.tensor(list(dict.fromkeys(own.tolist())), dtype=torch.long, device=own.device)

    def split(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts and the indices on `axis` that positions through experts stand for."""
        experts = torch.div(positions, self.extent, rounding_mode="floor")
        return experts, positions % self.extent


@dataclass(frozen=True, kw_only=True)
class CoupledGroup:
    """Matrices whose units must be chosen, moved and removed together.

    Kinds and their units:
        heads: query head u: rows of q and columns of o; rows of k and v of its key-value head.
        channels: intermediate channel u of a feed-forward: rows of gate and up, a column of down.
        vo_channels: u = g * head_dim + j, dimension j of key-value head g: one row of v and one
            column of o for each query head of g.
        expert_channels: u = e * channels + j, channel j of expert e in 3-D parameters.

    Legal orders (see `check_order`): units come in blocks of `block_size`. An order may permute
    units inside a block and, if `blocks_move`, whole blocks. For heads a block is the query heads
    of one key-value head.

    Args:
        name: path of the module that holds the matrices ("model.layers.3.mlp"); ":vo" appended
            for vo_channels.
        kind: see above.
        num_units: units of the group.
        producers: matrices whose *output* features are the units.
        consumers: matrices whose *input* features are the units.
        side: other tensors indexed by unit: norm weights of full width, attention sinks.
        block_size: units in a block; the number of query heads of a key-value head for heads.
        blocks_move: whether an order may exchange blocks.
        permutable: whether a legal order leaves the model's output unchanged.
        reason: why not, if not.
    """

    name: str
    kind: GroupKind
    num_units: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    side: tuple[Member, ...] = ()
    block_size: int = 1
    blocks_move: bool = True
    permutable: bool = True
    reason: str = ""

    @property
    def members(self) -> tuple[Member, ...]:
        """Producers, consumers and side tensors."""
        return self.producers + self.consumers + self.side

    def member(self, role: Role) -> Member:
        """Return the first member in this role; KeyError if there is none."""
        for member in self.members:
            if member.role == role:
                return member
        raise KeyError(f"{self.name} has no member {role!r}")

    def check_order(self, order: Tensor) -> None:
        """Raise unless `order` is a permutation of the units that the coupling allows.

        Args:
            order: (num_units,); unit order[i] comes to place i.

        Raises:
            ValueError: not a permutation, or units leave their block.
        """
        key = f"order of {self.name}"
        full = torch.arange(self.num_units)
        order = order.detach().cpu().long()
        whole = order.shape == full.shape and torch.equal(order.sort().values, full)
        require(
            key,
            tuple(order.shape),
            whole,
            f"a permutation of range({self.num_units}); remedy: list each unit exactly once",
        )
        blocks = torch.div(order, self.block_size, rounding_mode="floor").view(-1, self.block_size)
        kept = bool((blocks == blocks[:, :1]).all())
        require(
            key,
            "units that leave their block",
            kept,
            f"units in whole blocks of {self.block_size} ({self.block_meaning}); remedy: move "
            "whole blocks and permute inside them, or use the index layout",
        )
        home = torch.equal(blocks[:, 0], torch.arange(len(blocks)))
        require(
            key,
            "blocks that change places",
            self.blocks_move or home,
            f"each block of {self.block_size} ({self.block_meaning}) at its place; remedy: "
            "permute inside the blocks only",
        )

    @property
    def block_meaning(self) -> str:
        """What a block of units is, in words."""
        return {
            "heads": "the query heads of one key-value head",
            "channels": "single channels",
            "vo_channels": "the dimensions of one key-value head",
            "expert_channels": "the channels of one expert",
        }[self.kind]
