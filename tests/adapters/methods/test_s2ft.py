"""S2FT on tiny models: which units are trained, with which gradients, at what cost."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks

import sft
from sft import S2FTConfig

EVERY = ["q", "k", "v", "o", "gate", "up", "down"]


# -- units -----------------------------------------------------------------------------------


def test_consumers_are_trained_by_default(s2ft, slices) -> None:
    found = slices(s2ft())
    assert {name.split(".")[-1] for name in found} == {"o_proj", "down_proj"}
    assert {len(chosen) for name, chosen in found.items() if "down" in name} == {6}
    assert {len(chosen) for name, chosen in found.items() if "o_proj" in name} == {3}


def test_heads_under_grouped_query_attention(s2ft, slices) -> None:
    model = s2ft(roles=["q", "k", "v", "o"], ratio=0.5)  # two query heads of 16 share one of k, v
    found = slices(model)
    for layer in range(2):
        own = {n.split(".")[-1][0]: c for n, c in found.items() if f".{layer}." in n}
        assert own["q"] == own["o"] and own["q"] in (set(range(16)), set(range(16, 32)))
        assert own["k"] == own["v"] == set(range(16))


def test_vo_channels_couple_v_and_o(s2ft, slices) -> None:
    found = slices(s2ft(roles=["v", "o"], attention_unit="vo_channels", ratio=0.25))
    for layer in range(2):
        v, o = (found[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "vo")
        assert len(v) == 4 and o == v | {j + 16 for j in v}


def test_matrices_of_a_feed_forward_train_the_same_channels(s2ft, slices) -> None:
    found = slices(s2ft(roles=["gate", "up", "down"], ratio={"gate": 0.1, "up": 0.2, "down": 0.1}))
    gate, up, down = (found[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert gate == down < up


def test_gpt2_stores_inputs_as_rows(gpt2, randomize, batch, resident_logits) -> None:
    config = S2FTConfig(task_type="CAUSAL_LM", roles=[*EVERY[:4], "up", "down"], ratio=0.25)
    model = get_peft_model(gpt2(), config)
    randomize(model)
    aside, inside = model(**batch).logits, resident_logits(model, batch)
    torch.testing.assert_close(aside, inside, rtol=1e-5, atol=1e-5)
    layer = model.base_model.adapted_layers("default")["transformer.h.0.attn.c_attn"]
    assert (layer.side, layer.axis, len(layer.s2ft_indices["default"])) == ("out", 1, 3 * 16)
    merged = model.merge_and_unload()
    assert torch.equal(merged(**batch).logits, inside)


def test_backward_stops_below_the_lowest_trained_consumer(s2ft, batch) -> None:
    model = s2ft().train()
    seen = []
    for name in ("q_proj", "o_proj"):
        module = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}")
        module.register_forward_hook(lambda m, a, y: seen.append(y.requires_grad))
    model(**batch)
    assert seen == [False, True]


# -- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [["o", "down"], EVERY])
def test_s2ft_fact06_training_is_dense_training_of_the_slice(s2ft, batch, roles) -> None:
    model = s2ft(roles=roles, ratio=0.25).train()
    dense = s2ft(roles=roles, ratio=0.25)
    layers = model.base_model.adapted_layers("default")
    dense = dense.unload().train().requires_grad_()
    masks = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.s2ft_values["default"].data.fill_(1)
        masks[name] = layer.get_delta_weight("default")
        layer.s2ft_values["default"].data.zero_()
    settings = {"lr": 1e-3, "weight_decay": 0.0}
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    theirs = torch.optim.AdamW(dense.parameters(), **settings)
    with sft.resident(model):
        for _ in range(5):
            model(**batch).loss.backward()
            dense(**batch).loss.backward()
            for name, parameter in dense.named_parameters():
                mask = masks.get(name.removesuffix(".weight"))
                parameter.grad = parameter.grad * mask if mask is not None else None
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        for name, layer in layers.items():
            expected = dense.get_submodule(name).weight
            found = layer.get_base_layer().weight
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert torch.equal(found[masks[name] == 0], expected[masks[name] == 0])


def kept_bytes(model, batch) -> int:
    """Bytes kept by the graph of one forward pass in storages that are no parameter's."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(kept.values())


def test_s2ft_fact07_each_slice_saves_its_inputs_and_nothing_else(s2ft, batch) -> None:
    few, more = s2ft(ratio={"down": 0.1}).train(), s2ft(ratio={"down": 0.3}).train()
    with sft.resident(few), sft.resident(more):
        grown = kept_bytes(more, batch) - kept_bytes(few, batch)
    tokens, units, layers = batch["input_ids"].numel(), 19 - 6, 2
    assert grown == tokens * units * layers * 4


# -- forms -----------------------------------------------------------------------------------


def test_s2ft_fact10_a_strided_view_of_the_weight_is_refused(s2ft) -> None:
    layers = s2ft(roles=["gate", "down"], ratio=1.0).base_model.adapted_layers("default")
    down, gate = (layers[f"model.layers.0.mlp.{name}_proj"] for name in ("down", "gate"))
    with pytest.raises(ValueError, match=r"^live_slice: .* fused optimizers corrupt"):
        down.live_slice("default")
    assert gate.live_slice("default").data_ptr() == gate.get_base_layer().weight.data_ptr()
    gate.replace_slice("default", torch.tensor([3, 5]))
    with pytest.raises(ValueError, match=r"^live_slice: "):
        gate.live_slice("default")
    gate.replace_slice("default", torch.tensor([3, 4]))
    assert torch.equal(gate.live_slice("default"), gate.get_base_layer().weight[3:5])
