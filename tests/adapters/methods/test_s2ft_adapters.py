"""S2FT adapters as files and side by side: loading, switching, sums, mixed batches."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

import sft
from sft import S2FTConfig
from sft.adapters.layer import sparse_layers

EVERY = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.fixture
def trained(s2ft, randomize):
    model = s2ft()
    randomize(model)
    return model


# -- files -----------------------------------------------------------------------------------


def test_s2ft_fact12_a_merged_export_is_the_model_in_memory(
    trained, batch, tmp_path, resident_logits
) -> None:
    expected = resident_logits(trained, batch)
    trained.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, expected)


def test_s2ft_fact13_the_exact_factors_change_the_chosen_features_alone(
    s2ft, randomize, slices
) -> None:
    model = s2ft(roles=EVERY, ratio=0.25)
    randomize(model)
    for name, layer in model.base_model.adapted_layers("default").items():
        a, b = layer.low_rank("default")
        assert a.shape == (len(slices(model)[name]), layer.in_features)
        assert torch.equal(b @ a, layer.get_delta_weight("default"))
        axis = 0 if layer.side == "in" else 1
        changed = (b @ a).any(dim=axis).nonzero().flatten().tolist()
        assert set(changed) == slices(model)[name]


@pytest.mark.parametrize("allocation", ["uniform", "pooled"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_takes_its_units_from_the_file(
    s2ft, llama, batch, randomize, tmp_path, allocation, low_cpu_mem_usage, slices
) -> None:
    model = s2ft(ratio=0.1, selection="activation", allocation=allocation, calibration_batches=1)
    sft.calibrate(model, [batch])
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama(num_key_value_heads=1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert slices(loaded) == slices(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded.train()
    loaded(**batch)


def test_a_loaded_adapter_needs_no_folder_that_chose_it(
    s2ft, llama, trained, tmp_path, slices
) -> None:
    trained.save_pretrained(tmp_path / "first")
    second = s2ft(exclude=[str(tmp_path / "first")])
    second.save_pretrained(tmp_path / "second")
    (tmp_path / "first" / "adapter_model.safetensors").unlink()
    loaded = PeftModel.from_pretrained(llama(num_key_value_heads=1), tmp_path / "second")
    assert slices(loaded) == slices(second)
    with pytest.raises(ValueError, match=r"^exclude: .* holds no adapter_model.safetensors"):
        s2ft(exclude=[str(tmp_path / "first")])


def test_a_configuration_read_from_a_file_is_no_placeholder(s2ft, batch, tmp_path) -> None:
    s2ft(selection="weight").save_pretrained(tmp_path)
    config = S2FTConfig.from_pretrained(tmp_path)
    model = s2ft(**{k: getattr(config, k) for k in ("selection", "ratio")})
    assert not any(layer.pending for layer in sparse_layers(model).values())
    from_file = get_peft_model(model.unload(), config).train()
    with pytest.raises(RuntimeError, match=r"^selection: .* placeholder slice"):
        from_file(**batch)


def test_what_is_merged_is_not_taken_for_the_base(s2ft, llama, randomize, batch, tmp_path) -> None:
    model = s2ft(ratio={"down": 0.5})
    randomize(model, scale=0.5)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.load_adapter(tmp_path, "default")
    model.add_weighted_adapter(["default"], [1.0], "twin")
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["twin"])
    loaded = PeftModel.from_pretrained(llama(num_key_value_heads=1), tmp_path / "twin")
    assert torch.equal(loaded(**batch).logits, expected)


def test_a_sum_keeps_inputs_as_its_parts_do(s2ft, batch, randomize) -> None:
    model = s2ft(saved_inputs="int8")
    randomize(model)
    model.add_weighted_adapter(["default"], [2.0], "sum")
    model.set_adapter("sum")
    model.train()
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(**batch)
    assert any(t.dtype == torch.int8 for t in saved)


# -- several adapters --------------------------------------------------------------------------


def test_s2ft_fact14_apply_and_revert_restores_the_bits(llama, s2ft, randomize, same) -> None:
    base = llama(num_key_value_heads=1).bfloat16()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = s2ft(base)
    model.add_adapter("second", S2FTConfig(task_type="CAUSAL_LM", ratio=0.2, seed=7))
    for name in ("default", "second"):
        model.set_adapter(name)
        randomize(model, scale=0.3)
    with sft.resident(model):
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            held = model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer().weight
            assert not torch.equal(held, before["model.layers.0.mlp.down_proj.weight"])
    assert same({n: t.clone() for n, t in model.unload().state_dict().items()}, before)


def test_s2ft_fact15_disjoint_adapters_and_their_sum(
    trained, batch, randomize, tmp_path, slices
) -> None:
    trained.save_pretrained(tmp_path / "first")
    config = S2FTConfig(task_type="CAUSAL_LM", ratio=0.3, seed=0, exclude=[str(tmp_path / "first")])
    trained.add_adapter("second", config)
    trained.set_adapter("second")
    randomize(trained, seed=5)
    first, second = slices(trained), slices(trained, "second")
    assert first.keys() == second.keys()
    assert not any(first[name] & second[name] for name in first)
    trained.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    both = slices(trained, "both")
    for name, layer in trained.base_model.adapted_layers("both").items():
        assert both[name] == first[name] | second[name]
        parts = [layer.get_delta_weight(adapter) for adapter in ("default", "second")]
        assert torch.equal(layer.get_delta_weight("both"), parts[0] + parts[1])
    assert not any(p.requires_grad for n, p in trained.named_parameters() if n.endswith(".both"))
    trained.set_adapter("both")
    fused = trained(**batch).logits
    trained.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(trained(**batch).logits, fused, rtol=1e-5, atol=1e-5)


def test_weights_and_shared_units_in_a_sum(s2ft, randomize, batch, llama, tmp_path) -> None:
    model = s2ft(ratio={"down": 0.5})
    config = S2FTConfig(task_type="CAUSAL_LM", ratio={"o": 0.5, "down": 0.5}, seed=1)
    model.add_adapter("second", config)
    for seed, name in enumerate(("default", "second")):
        model.set_adapter(name)
        randomize(model, seed=seed)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    for layer in model.base_model.adapted_layers("sum").values():
        expected = -2 * layer.get_delta_weight("second")
        if "default" in layer.s2ft_values:
            expected = expected + 0.5 * layer.get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(llama(num_key_value_heads=1), tmp_path / "sum")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["default", "none"], [1, 1], "x"), r"^adapters: got .*none.*allowed is default"),
        (([], [], "x"), r"^adapters: "),
        ((["default"], [1, 1], "x"), r"^weights: "),
        ((["default"], [1], "default"), r"^adapter_name: "),
    ],
)
def test_sums_that_make_no_sense(trained, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        trained.add_weighted_adapter(*arguments)


def test_modules_trained_densely_have_no_sum(s2ft) -> None:
    """A sum without them would be read by the untrained module."""
    model = s2ft(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"^modules_to_save: got \['lm_head'\], allowed is none"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("roles", [["o", "down"], EVERY])
def test_s2ft_fact16_a_mixed_batch_is_each_adapters_own_forward(
    s2ft, llama, batch, randomize, roles
) -> None:
    model = s2ft(roles=roles, ratio=0.25).eval()
    model.add_adapter("second", S2FTConfig(task_type="CAUSAL_LM", roles=roles, ratio=0.5, seed=3))
    expected = {"__base__": llama(num_key_value_heads=1)(**batch).logits}
    for seed, name in enumerate(("default", "second")):
        model.set_adapter(name)
        randomize(model, seed=seed)
        model.merge_adapter([name])
        expected[name] = model(**batch).logits
        model.unmerge_adapter()
    for names in (["second", "__base__", "default"], ["default", "default", "second"]):
        with sft.resident(model):
            mixed = model(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
