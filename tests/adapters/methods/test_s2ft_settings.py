"""What S2FT's configuration takes, what it refuses, and what it says then."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sft import S2FTConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"roles": ["o", "middle"]}, r"^roles: got \['o', 'middle'\], allowed is a list of q, k"),
        ({"roles": []}, r"^roles: got \[\]"),
        ({"ratio": 0.0}, r"^ratio: got 0.0, allowed is 0 < ratio <= 1"),
        ({"ratio": 1.5}, r"^ratio: got 1.5"),
        ({"ratio": True}, r"^ratio: got True"),
        ({"ratio": {"o": 0.1, "down": 2}}, r"^ratio: got 2"),
        ({"ratio": {"o": 0.1}, "roles": ["down"]}, r"^ratio: .* one share for each of the roles"),
        ({"ratio": 0.1, "density": 0.1}, r"^density, ratio: got 'all of them', .* exactly one"),
        ({"density": 0}, r"^density: got 0"),
        ({"num_weights": -1}, r"^num_weights: got -1"),
        ({"match_lora_rank": 0}, r"^match_lora_rank: got 0"),
        ({"allocation": "even"}, r"^allocation: got 'even', allowed is uniform, pooled"),
        ({"attention_unit": "blocks"}, r"^attention_unit: got 'blocks', allowed is auto, heads"),
        (
            {"attention_unit": "channels", "roles": ["q"]},
            r"^attention_unit: got 'channels'",
        ),
        ({"attention_unit": "vo_channels", "roles": ["k", "o"]}, r"^attention_unit: got 'vo_ch"),
        ({"selection": "fisher"}, r"^selection: got 'fisher', allowed is random, weight, activ"),
        ({"selection_order": "middle"}, r"^selection_order: got 'middle', allowed is "),
        ({"calibration_batches": 0}, r"^calibration_batches: got 0, allowed is a whole number"),
        ({"layout": "sorted"}, r"^layout: got 'sorted', allowed is index, permuted"),
        ({"layout": "permuted", "attention_unit": "channels"}, r"^layout: got 'permuted', allowed"),
        ({"layout": "permuted", "roles": ["any"], "target_modules": ["x"]}, r"^layout: got 'per"),
        ({"roles": ["any"]}, r"^target_modules: got None, allowed is names of modules"),
        ({"roles": "qkv"}, r"^roles: got 'qkv', allowed is a list of q, k, v"),
        ({"exclude": "runs/first"}, r"^exclude: got 'runs/first', allowed is a list of folders"),
        ({"optimizer": "adam"}, r"^optimizer: got 'adam', allowed is "),
    ],
)
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        S2FTConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj"]}, r"is the 'q' of 'model.layers.0.self_attn', .*add 'q' to"),
        ({"target_modules": ["lm_head"]}, r"'lm_head' is a matrix of no attention or .*add 'any'"),
        ({"target_modules": ["embed_tokens"]}, r"is a Embedding; allowed are nn.Linear"),
        ({"target_modules": "all-linear"}, r"got 'all-linear', .*leave it out"),
        ({"exclude_modules": ["o_proj", "down_proj"]}, r"leaves no matrix of roles"),
        ({"roles": ["any", "o"], "target_modules": ["embed_tokens"]}, r"is a Embedding"),
    ],
)
def test_modules_that_have_no_part_in_it(s2ft, settings, message) -> None:
    with pytest.raises(ValueError, match=r"^target_modules: .*" + message) as caught:
        s2ft(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"density": 0.001}, r"^density=0.001: 6 weights leave no unit for"),
        ({"attention_unit": "heads", "num_weights": 600}, r"^num_weights=600: .*self_attn.o_proj"),
        ({"num_weights": 10**7}, r"^num_weights=10000000: asks for .* the targets hold 6,144"),
        ({"layout": "permuted", "ratio": 0.9, "selection": "fused"}, r"^selection: got 'fused'"),
        ({"exclude": ["no/such/folder"]}, r"^exclude: got 'no/such/folder', which holds no"),
    ],
)
def test_settings_that_the_model_does_not_fit(s2ft, settings, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        s2ft(**settings)
    assert "\n" not in str(caught.value)


def test_a_refusal_leaves_the_model_as_it_was(llama) -> None:
    base = llama(num_key_value_heads=2, num_attention_heads=4)
    kinds = [type(module) for module in base.modules()]
    # heads 0 and 2, say, cannot come side by side: they read different key-value heads
    config = S2FTConfig(layout="permuted", ratio={"o": 0.5}, seed=0, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"whole blocks of 2 .*use the index layout"):
        get_peft_model(base, config)
    assert [type(module) for module in base.modules()] == kinds
    assert not hasattr(base, "peft_config") or not base.peft_config


def test_a_model_without_units_is_refused(gpt2) -> None:
    toy = nn.Sequential(nn.Linear(4, 3), nn.Embedding(4, 4))
    with pytest.raises(ValueError, match=r"^model_type: got 'Sequential', .*use another method"):
        get_peft_model(toy, S2FTConfig(ratio=0.5))
    with pytest.raises(ValueError, match=r"^roles: got 'gate', .* allowed are roles among down, k"):
        get_peft_model(gpt2(), S2FTConfig(ratio=0.5, roles=["gate"]))


def test_any_takes_input_features_of_whatever_is_named() -> None:
    torch.manual_seed(0)
    toy = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(5, 6)
    expected = toy(x)
    model = get_peft_model(toy, S2FTConfig(roles=["any"], target_modules=["0"], ratio=0.5))
    layer = model.base_model.adapted_layers("default")["0"]
    assert (layer.side, tuple(layer.s2ft_values["default"].shape)) == ("in", (3, 4))
    assert torch.equal(model(x), expected)


def test_a_matrix_that_its_module_never_calls_is_refused() -> None:
    """nn.MultiheadAttention multiplies by its out_proj's weight past the layer around it."""
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    config = S2FTConfig(roles=["any"], target_modules=["out_proj"], ratio=0.5)
    with pytest.raises(ValueError, match=r"^target_modules: 'attention.out_proj' is never called"):
        get_peft_model(base, config)


def test_the_other_side_of_a_matrix_is_refused(s2ft, same) -> None:
    model = s2ft(roles=["any"], target_modules=["k_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^roles: got 'k', which trains output features of .*k_p"):
        model.add_adapter("second", S2FTConfig(task_type="CAUSAL_LM", roles=["k"], ratio=0.1))
    assert list(model.peft_config) == ["default"]
    assert same(dict(model.state_dict()), before)


def test_exclude_modules_narrows_the_roles(s2ft, slices) -> None:
    found = slices(s2ft(exclude_modules=r".*layers\.1\..*"))
    assert set(found) == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}
    named = slices(s2ft(target_modules=["model.layers.1.mlp.down_proj"]))
    assert set(named) == {"model.layers.1.mlp.down_proj"}


def test_the_default_budget_and_units(s2ft) -> None:
    config = S2FTConfig()
    assert (config.density, config.roles, config.unit) == (0.02, ["o", "down"], "channels")
    assert S2FTConfig(roles=["q", "o"]).unit == "heads"
    assert S2FTConfig(layout="permuted").unit == "heads"
    assert S2FTConfig(ratio={"down": 0.1}).roles == ["down"]
    assert config.suited_optimizer == "trainer"


def test_settings_survive_a_file(s2ft, tmp_path) -> None:
    model = s2ft(ratio={"o": 0.25, "down": 0.125}, allocation="pooled", seed=4)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["ratio"] == {"o": 0.25, "down": 0.125} and "from_file" not in written
    again = S2FTConfig.from_pretrained(tmp_path)
    assert again.from_file and again.roles == ["o", "down"] and again.seed == 4


def test_experts_that_keep_a_forward_of_their_own_are_refused() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    few = {"vocab_size": 16, "num_hidden_layers": 1, "num_local_experts": 2, "pad_token_id": 0}
    base = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **few, bos_token_id=1))
    with pytest.raises(ValueError, match=r"^roles: got 'down', .*Llama4TextExperts.*roles=\['o'\]"):
        get_peft_model(base, S2FTConfig(ratio=0.5))
    assert get_peft_model(base, S2FTConfig(ratio=0.5, roles=["o"])).base_model.groups
