"""Groups of a feed-forward module: its intermediate channels, dense or expert by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sft.adapters.structure.groups import CoupledGroup, IndexRule, Member, Role
from sft.adapters.structure.layout import Site, matrix

ONE = IndexRule(size=1, stride=1)


@dataclass(frozen=True)
class FeedForward:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate.

    Args:
        up: path of the matrix in the feed-forward module (fc1).
        down: path of the consumer.
        gate: path of the gate, or "".
    """

    up: str
    down: str
    gate: str = ""

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the channels of a module that has these matrices."""
        names: list[tuple[Role, str]] = [("gate", self.gate), ("up", self.up)]
        down = matrix(site, self.down)
        found = [(role, matrix(site, name)) for role, name in names if name]
        if down is None or any(one is None or one.outputs != down.inputs for _, one in found):
            return []
        producers = tuple(one.producer(role, ONE) for role, one in found if one is not None)
        return [_channels(site.path, down.inputs, producers, down.consumer("down", ONE))]


@dataclass(frozen=True)
class FusedFeedForward:
    """Gate and up in one matrix: output features [all gate | all up]."""

    gate_up: str
    down: str

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the channels of a module that has these matrices."""
        both, down = matrix(site, self.gate_up), matrix(site, self.down)
        if both is None or down is None or both.outputs != 2 * down.inputs:
            return []
        second = IndexRule(size=1, stride=1, offset=down.inputs)
        producers = (both.producer("gate", ONE), both.producer("up", second))
        return [_channels(site.path, down.inputs, producers, down.consumer("down", ONE))]


@dataclass(frozen=True)
class Experts:
    """Experts as 3-D parameters gate_up_proj and down_proj of one module, experts on axis 0.

    Args:
        transposed: stored as (experts, in, out) instead of (experts, out, in).
        order: gate and up in gate_up_proj: "halves" [all gate | all up] or "pairs" (gate at even,
            up at odd places).
    """

    transposed: bool = False
    order: Literal["halves", "pairs"] = "halves"

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the channels of all experts of a module that has these parameters."""
        both, down = (site.module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
        if both is None or down is None or both.dim() != 3 or down.dim() != 3:
            return []
        output, inner = (2, 1) if self.transposed else (1, 2)
        experts, count = down.shape[0], down.shape[inner]
        if both.shape[0] != experts or both.shape[output] != 2 * count:
            return []
        stride = 1 if self.order == "halves" else 2
        other = count if self.order == "halves" else 1
        bias = "gate_up_proj_bias" if "gate_up_proj_bias" in site.module._parameters else None
        roles: tuple[tuple[Role, int], ...] = (("gate", 0), ("up", other))
        producers = tuple(
            _expert_member(site, role, "gate_up_proj", output, 2 * count, count, stride, at, bias)
            for role, at in roles
        )
        consumer = _expert_member(site, "down", "down_proj", inner, count, count, 1, 0, None)
        group = CoupledGroup(
            name=site.path,
            kind="expert_channels",
            num_units=experts * count,
            producers=producers,
            consumers=(consumer,),
            block_size=count,
            blocks_move=False,
        )
        return [group]


def _channels(
    path: str, count: int, producers: tuple[Member, ...], consumer: Member
) -> CoupledGroup:
    return CoupledGroup(
        name=path, kind="channels", num_units=count, producers=producers, consumers=(consumer,)
    )


def _expert_member(
    site: Site,
    role: Role,
    parameter: str,
    axis: int,
    extent: int,
    count: int,
    stride: int,
    offset: int,
    bias: str | None,
) -> Member:
    rule = IndexRule(size=1, stride=stride, offset=offset, per_block=count, block_stride=extent)
    return Member(
        role=role,
        module=site.path,
        parameter=parameter,
        axis=axis,
        extent=extent,
        rule=rule,
        expert_axis=0,
        bias=bias,
    )
