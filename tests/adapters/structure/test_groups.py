"""Positions of units in stored tensors, plain, fused, interleaved and shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.groups import CoupledGroup, IndexRule

Build = Callable[..., nn.Module]


def first(model: nn.Module, kind: str) -> CoupledGroup:
    return next(group for group in coupled_groups(model) if group.kind == kind)


def spans(*pairs: tuple[int, int]) -> list[int]:
    return [position for start, stop in pairs for position in range(start, stop)]


def at(group: CoupledGroup, role: str, *units: int) -> list[int]:
    found: Tensor = group.member(role).positions(torch.tensor(units))  # type: ignore[arg-type]
    return found.tolist()


def test_rule_of_consecutive_units() -> None:
    rule = IndexRule(size=3, stride=3, offset=10)
    assert rule.positions(torch.tensor([2, 0])).tolist() == [16, 17, 18, 10, 11, 12]
    assert rule.positions(torch.tensor([], dtype=torch.int32)).tolist() == []


def test_rule_of_blocks_and_steps() -> None:
    rule = IndexRule(size=2, stride=1, step=4, per_block=4, block_stride=8)
    assert rule.positions(torch.tensor([0, 3, 5])).tolist() == [0, 4, 3, 7, 9, 13]


def test_key_value_heads_count_once(build: Build) -> None:
    """Four query heads of 12 on two key-value heads."""
    group = first(build("llama"), "heads")
    assert (group.num_units, group.block_size) == (4, 2)
    assert at(group, "q", 3, 0) == spans((36, 48), (0, 12))
    assert at(group, "o", 3, 0) == spans((36, 48), (0, 12))
    assert at(group, "k", 3, 2, 0) == spans((12, 24), (0, 12))
    assert group.member("o").axis == 1
    assert group.member("q").axis == 0


def test_dimensions_of_v_and_o(build: Build) -> None:
    """Dimension 5 of key-value head 1: a row of v, a column of o for each of its query heads."""
    group = first(build("llama"), "vo_channels")
    assert group.num_units == 24
    assert at(group, "v", 12 + 5) == [17]
    assert at(group, "o", 12 + 5) == [24 + 5, 36 + 5]


def test_phi3_segments(build: Build) -> None:
    """qkv_proj is [q 4x8 | k 2x8 | v 2x8], gate_up_proj [gate 48 | up 48]."""
    model = build("phi3")
    heads, values, channels = (first(model, k) for k in ("heads", "vo_channels", "channels"))
    assert at(heads, "q", 1) == spans((8, 16))
    assert at(heads, "k", 1, 2) == spans((32, 40), (40, 48))
    assert at(heads, "v", 3) == spans((56, 64))
    assert at(values, "v", 9) == [48 + 9]
    assert (at(channels, "gate", 7), at(channels, "up", 7)) == ([7], [48 + 7])
    assert heads.member("q").module == heads.member("v").module
    assert heads.member("q").module.endswith("qkv_proj")


def test_gpt2_stores_inputs_first(build: Build) -> None:
    model = build("gpt2")
    heads, channels = first(model, "heads"), first(model, "channels")
    assert (heads.member("q").axis, heads.member("o").axis) == (1, 0)
    assert (channels.member("up").axis, channels.member("down").axis) == (1, 0)
    assert [at(heads, role, 1) for role in "qkv"] == [
        spans((8, 16)),
        spans((40, 48)),
        spans((72, 80)),
    ]
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    assert weight.shape[channels.member("up").axis] == channels.num_units == 128


def test_gpt2_cross_attention(build: Build) -> None:
    group = next(
        g for g in coupled_groups(build("gpt2", add_cross_attention=True)) if "cross" in g.name
    )
    assert group.member("q").module.endswith("q_attn")
    assert [at(group, role, 1) for role in "qkv"] == [
        spans((8, 16)),
        spans((8, 16)),
        spans((40, 48)),
    ]


def test_heads_interleaved_with_keys_and_values(build: Build) -> None:
    """GPT-NeoX: [q k v] a head. Falcon: [q q k v] a key-value head, or [q q q q | k | v]."""
    neox = first(build("gpt_neox"), "heads")
    assert [at(neox, role, 1) for role in "qkv"] == [
        spans((24, 32)),
        spans((32, 40)),
        spans((40, 48)),
    ]
    grouped = first(build("falcon-groups"), "heads")
    assert at(grouped, "q", 1, 2) == spans((8, 16), (32, 40))
    assert at(grouped, "k", 2) == spans((48, 56))
    assert at(grouped, "v", 2) == spans((56, 64))
    single = first(build("falcon-multi-query"), "heads")
    assert single.block_size == 4
    assert [at(single, role, 3) for role in "qkv"] == [
        spans((24, 32)),
        spans((32, 40)),
        spans((40, 48)),
    ]


@pytest.mark.parametrize(
    ("name", "axes", "gate", "up"),
    [
        ("mixtral", (1, 1, 2), 7, 48 + 7),
        ("llama4_text", (2, 2, 1), 7, 48 + 7),
        ("gpt_oss", (2, 2, 1), 14, 15),
    ],
)
def test_channels_of_experts(
    build: Build, name: str, axes: tuple[int, ...], gate: int, up: int
) -> None:
    """Channel 7 of expert 2, of 48: its index on the stored axis."""
    model = build(name)
    group = first(model, "expert_channels")
    units = torch.tensor([2 * 48 + 7])
    wanted = {"gate": gate, "up": up, "down": 7}
    for member, axis in zip(group.members, axes, strict=True):
        tensor = getattr(model.get_submodule(member.module), member.parameter)
        experts, places = member.split(member.positions(units))
        assert (experts.tolist(), places.tolist()) == ([2], [wanted[member.role]])
        assert (member.axis, member.expert_axis) == (axis, 0)
        assert (member.extent, group.num_units) == (tensor.shape[axis], 4 * 48)


def test_latent_attention(build: Build) -> None:
    """DeepSeek: rows of q_b are 8 + 4 a head, of kv_b 8 (k) + 12 (v), columns of o 12."""
    model = build("deepseek_v3")
    heads, values = first(model, "heads"), first(model, "vo_channels")
    assert at(heads, "q", 1) == spans((12, 24))
    assert at(heads, "k", 1) == spans((20, 28))
    assert at(heads, "v", 1) == spans((28, 40))
    assert at(heads, "o", 1) == spans((12, 24))
    assert (at(values, "v", 14), at(values, "o", 14)) == ([20 + 8 + 2], [14])


def test_units_cover_each_axis_once(family: str, build: Build) -> None:
    """Every feature of a consumer belongs to one unit; no producer's feature belongs to two."""
    for group in coupled_groups(build(family)):
        everything = torch.arange(group.num_units)
        for member in group.consumers:
            count = member.extent * (
                group.num_units // group.block_size if member.expert_axis == 0 else 1
            )
            assert torch.equal(member.positions(everything).sort().values, torch.arange(count))
        for member in group.producers:
            positions = member.positions(everything)
            assert len(positions.unique()) == len(positions)


def test_a_missing_role_is_named(build: Build) -> None:
    with pytest.raises(KeyError, match="has no member 'gate'"):
        first(build("opt"), "channels").member("gate")
