"""permute_: refusals come before anything moves; units in front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.permute import front_order, permute_

Build = Callable[..., nn.Module]
MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"


def refuse(model: nn.Module, orders: dict[str, torch.Tensor], match: str) -> None:
    """Expect a refusal, and that no weight moved."""
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        permute_(model, orders)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def test_refusals(build: Build) -> None:
    model, good = build("llama"), torch.arange(48).flip(0)
    refuse(model, {MLP: good, "model.layers.9.mlp": good}, "allowed is the name of a group")
    refuse(model, {MLP: good, "model.layers.1.mlp": good[1:]}, r"a permutation of range\(48\)")
    twice = good.clone()
    twice[0] = 0
    refuse(model, {"model.layers.1.mlp": twice}, r"a permutation of range\(48\)")
    refuse(model, {MLP: good, ATTENTION: torch.tensor([0, 2, 1, 3])}, "leave their block")


def test_an_adapter_is_refused(build: Build) -> None:
    base = build("llama")
    get_peft_model(base, LoraConfig(target_modules=["up_proj"]))  # type: ignore[arg-type]
    refuse(base, {MLP: torch.arange(48)}, "permute the base model before adapters")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(48 * 32 // 2, 1, dtype=torch.uint8),  # two 4-bit values a byte
        torch.zeros(48, 32, dtype=torch.int8),
        torch.zeros(48, 32).to(torch.float8_e4m3fn),  # scaled block by block elsewhere
        None,
    ],
    ids=["4-bit", "8-bit", "float8", "none"],
)
def test_a_packed_weight_is_refused(build: Build, weight: torch.Tensor | None) -> None:
    model = build("llama")
    layer = model.get_submodule(f"{MLP}.up_proj")
    held = None if weight is None else nn.Parameter(weight, requires_grad=False)
    layer.weight = held  # type: ignore[assignment]
    refuse(model, {MLP: torch.arange(48)}, "whole, unpacked weight with 48 entries on axis 0")


def test_gradients_and_tied_heads_survive(build: Build) -> None:
    """Parameters stay the same objects: optimizers and ties keep their hold."""
    model = build("llama", tie_word_embeddings=True)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    permute_(model, {MLP: torch.arange(48).flip(0)})
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in model.parameters())


def test_chosen_units_come_in_front(build: Build) -> None:
    groups = {group.name: group for group in coupled_groups(build("llama"))}
    chosen = torch.tensor([40, 3, 17])
    order = front_order(groups[MLP], chosen)
    assert set(order[:3].tolist()) == {40, 3, 17}
    groups[MLP].check_order(order)
    heads = groups[ATTENTION]
    for units in ([2], [2, 3], [2, 3, 1], [0, 2, 3], []):
        order = front_order(heads, torch.tensor(units, dtype=torch.long))
        assert set(order[: len(units)].tolist()) == set(units)
        heads.check_order(order)
    with pytest.raises(ValueError, match=r"whole blocks of 2 .* choose whole blocks"):
        front_order(heads, torch.tensor([0, 2]))
    values = groups[f"{ATTENTION}:vo"]
    assert front_order(values, torch.tensor([5]))[0] == 5
    with pytest.raises(ValueError, match="whole blocks of 12"):
        front_order(values, torch.tensor([13]))
