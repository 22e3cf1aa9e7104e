"""Negative controls: orders that the map refuses do change the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from sft.adapters.structure.check import random_order
from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.permute import permute_
from sft.adapters.structure.probe import output
from sft.adapters.structure.reorder import reorder_

Build = Callable[..., nn.Module]
VISIBLE = 1e-2


def change_by(model: nn.Module, group: CoupledGroup, order: torch.Tensor) -> float:
    before = output(model)
    reorder_(model, group, order)
    return float((output(model) - before).abs().max())


def heads_of(model: nn.Module, name: str = "") -> CoupledGroup:
    return next(g for g in coupled_groups(model) if g.kind == "heads" and name in g.name)


def test_heads_of_two_key_value_groups_cannot_be_exchanged(build: Build) -> None:
    model = build("llama")
    group, order = heads_of(model), torch.tensor([0, 2, 1, 3])
    with pytest.raises(ValueError, match=r"whole blocks of 2 \(the query heads of one key-value"):
        permute_(model, {group.name: order})
    assert change_by(model, group, order) > VISIBLE


def test_whole_key_value_groups_and_heads_inside_one_can(build: Build) -> None:
    model = build("llama")
    group = heads_of(model)
    for order in ([2, 3, 0, 1], [1, 0, 2, 3], [3, 2, 1, 0]):
        assert change_by(model, group, torch.tensor(order)) < 1e-4


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_alibi_ties_heads_to_their_number(build: Build, name: str) -> None:
    model = build(name)
    group = heads_of(model)
    assert not group.permutable
    order = torch.tensor([3, 2, 1, 0])
    with pytest.raises(ValueError, match="ALiBi ties a slope"):
        permute_(model, {group.name: order})
    assert change_by(model, group, order) > VISIBLE


def test_t5_shares_one_table_of_positions(build: Build) -> None:
    model = build("t5")
    group = heads_of(model, "encoder.block.0.layer.0.SelfAttention")
    assert "relative-position bias of block 0" in group.reason
    assert change_by(model, group, torch.tensor([3, 2, 1, 0])) > VISIBLE
    cross = heads_of(model, "EncDecAttention")
    assert cross.permutable
    assert change_by(model, cross, torch.tensor([3, 2, 1, 0])) < 1e-4


@pytest.mark.parametrize("name", ["olmo2", "cohere-norms", "stablelm-norms", "gpt_oss"])
def test_side_tensors_move_along(build: Build, name: str) -> None:
    """Norms of full width, a row or an entry a head, and attention sinks."""
    model = build(name)
    group = heads_of(model)
    order = torch.tensor([3, 2, 1, 0])
    assert group.side
    assert change_by(model, replace(group, side=()), order) > VISIBLE


def test_norms_that_heads_share_stay(build: Build) -> None:
    assert heads_of(build("qwen3")).side == heads_of(build("phi")).side == ()


def test_dimensions_of_v_stay_in_their_head(build: Build) -> None:
    model = build("llama")
    group = next(g for g in coupled_groups(model) if g.kind == "vo_channels")
    order = torch.arange(group.num_units).roll(group.block_size)
    with pytest.raises(ValueError, match="blocks that change places"):
        permute_(model, {group.name: order})
    assert change_by(model, group, order) > VISIBLE


def test_channels_stay_in_their_expert(build: Build) -> None:
    model = build("mixtral")
    group = next(g for g in coupled_groups(model) if g.kind == "expert_channels")
    assert (group.num_units, group.block_size) == (4 * 48, 48)
    order = torch.arange(group.num_units).roll(group.block_size)
    with pytest.raises(ValueError, match="blocks that change places"):
        permute_(model, {group.name: order})
    assert change_by(model, group, order) > VISIBLE


def test_biases_of_producers_move_those_of_consumers_stay(build: Build) -> None:
    model = build("opt")
    group = heads_of(model)
    assert [m.bias for m in group.producers] == ["bias"] * 3
    assert [m.bias for m in group.consumers] == [None]
    still = tuple(replace(m, bias=None) for m in group.producers)
    order = random_order(group, torch.Generator().manual_seed(1))
    assert change_by(model, replace(group, producers=still), order) > VISIBLE
