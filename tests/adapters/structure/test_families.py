"""Every family in the map: its units can be moved without a trace, and are what we say they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from sft.adapters.structure.check import TOLERANCE, random_order, self_check
from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.permute import inverse, permute_
from sft.adapters.structure.probe import output
from sft.adapters.structure.reorder import reorder_

Build = Callable[..., nn.Module]


def test_moving_units_keeps_the_output(family: str, build: Build) -> None:
    """All permutable groups at once; then back, bit for bit."""
    model = build(family)
    before, bits = output(model), {n: t.clone() for n, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    groups = [group for group in coupled_groups(model) if group.permutable]
    orders = {group.name: random_order(group, generator) for group in groups}
    permute_(model, orders)
    assert any(not torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert float((output(model) - before).abs().max()) <= TOLERANCE
    permute_(model, {name: inverse(orders[name]) for name in reversed(orders)})
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def test_every_kind_of_unit_reaches_the_output(family: str, build: Build) -> None:
    """Moving the consumers alone changes the output, or the test above would prove nothing."""
    model = build(family)
    before = output(model)
    groups = coupled_groups(model)
    if family == "gemma3":  # without images its vision tower doesn't run
        groups = [group for group in groups if "vision" not in group.name]
    for group in groups:
        moved = deepcopy(model)
        alone = replace(group, producers=(), side=())
        reorder_(moved, alone, random_order(group, torch.Generator().manual_seed(1)))
        change = float((output(moved) - before).abs().max())
        assert change > 10 * TOLERANCE, (group.name, change)


def test_the_self_check_agrees(family: str, build: Build) -> None:
    assert self_check(build(family)) is None


def test_all_layers_are_found(family: str, build: Build) -> None:
    """Each attention gives heads and v-o dimensions; each layer has channels."""
    model = build(family)
    groups = coupled_groups(model)
    heads = [group for group in groups if group.kind == "heads"]
    values = [group for group in groups if group.kind == "vo_channels"]
    channels = [group for group in groups if group.kind in ("channels", "expert_channels")]
    towers = {"clip": 2, "siglip": 2, "gemma3": 2, "whisper": 2, "t5": 2, "t5-gated": 2}
    layers = 2 * towers.get(family, 1)
    cross = 2 if family in ("whisper", "t5", "t5-gated") else 0
    assert len(heads) == len(values) == layers + cross
    assert len({group.name.rpartition(".")[0] for group in channels}) >= layers // 2
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)
    everything = {name for name, _ in model.named_modules()}
    assert {member.module for group in groups for member in group.members} <= everything
