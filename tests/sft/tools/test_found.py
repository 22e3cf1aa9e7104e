"""What a folder changes, read without the weights of its base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

import sft
from sft.errors import UserError
from sft.export.delta import save_delta
from sft.tools.change import change_of, from_dense
from sft.tools.found import ModelChanges, find_changes
from sft.tools.opened import open_adapter

METHODS = ["spiel", "s2ft", "sora", "sltrain", "lora"]


@pytest.mark.parametrize("method", METHODS)
def test_changes_are_those_of_the_loaded_adapter(saved, deltas, method) -> None:
    folder = saved("one", method)
    wanted, found = deltas(folder), find_changes(str(folder))
    assert found.method == method
    assert set(found.names()) == set(wanted)
    for name, delta in wanted.items():
        assert torch.equal(found.read(name).dense(), delta), name


def test_changes_of_a_model_with_transposed_weights(saved, deltas, gpt2, tmp_path) -> None:
    gpt2().save_pretrained(tmp_path / "gpt2")
    for method in ("spiel", "s2ft", "sora", "lora"):
        fields = {"fan_in_fan_out": True} if method == "lora" else {}
        folder = saved(method, method, over=tmp_path / "gpt2", **fields)
        found = find_changes(str(folder))
        for name, delta in deltas(folder).items():
            assert found.read(name).shape == tuple(delta.shape)
            assert torch.equal(found.read(name).dense(), delta), (method, name)


def test_no_weight_of_the_base_is_read(saved, base) -> None:
    folder = saved("one", selection="magnitude")
    (base / "model.safetensors").unlink()
    found = find_changes(str(folder))
    assert all(len(found.read(name).values) for name in found.names())


def test_the_base_takes_no_memory(saved) -> None:
    model = open_adapter(saved("one")).model.get_base_model()
    held = {p.untyped_storage().nbytes() for n, p in model.named_parameters() if "delta" not in n}
    assert held == {2}


def test_a_run_is_read_by_its_adapter(saved, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    saved("one").rename(tmp_path / "run" / "adapter")
    assert find_changes(str(tmp_path / "run")).method == "spiel"


def test_trained_positions_count_where_nothing_moved(llama) -> None:
    model = get_peft_model(llama(), sft.SpielConfig(num_weights=700))
    for layer in model.base_model.adapted_layers("default").values():
        change = change_of(layer, "default")
        assert torch.equal(change.support, layer.support("default").long())
        assert change.trained == len(change.values) > 0 and not change.values.any()


def test_lines_have_the_positions_of_their_values(saved) -> None:
    found = find_changes(str(saved("one", "s2ft")))
    for name in found.names():
        change = found.read(name)
        assert change.indices is not None and bool((change.indices.diff() > 0).all())
        assert 0 < change.density < 0.5
        assert torch.equal(change.dense().flatten()[change.indices], change.values)


def test_a_dense_difference_with_few_entries_is_kept_by_positions() -> None:
    delta = torch.zeros(4, 5)
    delta[1, 2] = 3.0
    change = from_dense(delta)
    assert change.indices.tolist() == [7] and change.values.tolist() == [3.0]
    assert from_dense(torch.ones(4, 5)).indices is None
    assert torch.equal(change.dense(), delta)


def test_a_merged_model_changes_what_its_adapter_does(saved, loaded, base, tmp_path) -> None:
    folder = saved("one")
    loaded(folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, adapter = ModelChanges(str(tmp_path / "merged"), str(base)), find_changes(str(folder))
    assert set(merged.names()) == set(adapter.names())
    for name in adapter.names():
        got, wanted = merged.read(name), adapter.read(name)
        assert torch.equal(got.indices, wanted.indices)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=1e-7)


def test_a_whole_model_needs_a_base(base) -> None:
    with pytest.raises(UserError, match="is a whole model; pass --base"):
        find_changes(str(base))
    assert find_changes(str(base), str(base)).names() == []


def test_models_of_other_shapes_are_refused(base, llama, tmp_path) -> None:
    llama(intermediate_size=48).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"down_proj.weight is \(32, 48\), that of .* \(32, 64\)"):
        ModelChanges(str(tmp_path / "other"), str(base)).names()


def test_a_delta_of_the_model_is_read_against_its_base(base, llama, tmp_path) -> None:
    before = {n: p.detach() for n, p in llama().named_parameters() if n.endswith("q_proj.weight")}
    after = {name: tensor.clone() for name, tensor in before.items()}
    first = next(iter(after))
    after[first][3, 4] += 0.5
    save_delta(tmp_path / "delta", before, after, {"model": str(base)})
    found = find_changes(str(tmp_path / "delta"))
    assert found.method == "delta" and found.names() == [first.removesuffix(".weight")]
    change = found.read(found.names()[0])
    assert change.indices.tolist() == [3 * 32 + 4]
    torch.testing.assert_close(change.values, torch.tensor([0.5]))


def test_a_head_that_is_trained_whole_tells_the_classes(base, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    config = sft.SpielConfig(density=0.1, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "one")
    opened = open_adapter(tmp_path / "one")
    assert {name: tuple(p.shape) for name, p in opened.whole().items()} == {"score.weight": (5, 32)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "it was not saved whole"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "does not read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "got list, allowed is an object"),
        (lambda f: (f / "adapter_config.json").unlink(), "neither an adapter nor a run with one"),
        (lambda f: _without_base(f), "does not name its base model; pass --base"),
    ],
    ids=["tensors", "json", "list", "settings", "base"],
)
def test_a_damaged_adapter_is_refused_in_one_line(saved, damage, message) -> None:
    folder = saved("one")
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_adapter(folder)


def _without_base(folder) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": None})
    )


def test_an_adapter_of_another_model_is_refused(saved, llama, tmp_path) -> None:
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"does not fit .*small"):
        open_adapter(saved("one"), str(tmp_path / "small"))


def test_a_run_of_the_whole_model_is_read_by_its_merged_weights(base, llama, tmp_path) -> None:
    run = tmp_path / "run"
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[2, 3] += 1.0
    model.save_pretrained(run / "merged")
    with pytest.raises(UserError, match="does not say what it trained; pass --base"):
        find_changes(str(run))
    (run / "run.json").write_text(json.dumps({"recipe": {"model": {"name": str(base)}}}))
    found = find_changes(str(run))
    assert found.names() == ["model.layers.0.mlp.up_proj"]
    assert found.read(found.names()[0]).indices.tolist() == [2 * 32 + 3]
    scratch = {"recipe": {"model": {"name": str(base), "config": {}}}}
    (run / "run.json").write_text(json.dumps(scratch))
    with pytest.raises(UserError, match="trained random weights"):
        find_changes(str(run))


def test_an_adapter_from_random_weights_is_the_weights(base, tmp_path) -> None:
    from transformers import AutoConfig

    config = sft.SLTrainConfig(r=4, density=0.05)
    model = sft.pretrain_model(AutoConfig.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "one")
    found = find_changes(str(tmp_path / "one"), str(base))
    merged = model.merge_and_unload()
    for name in found.names():
        weight = merged.get_submodule(name).weight
        torch.testing.assert_close(found.read(name).dense(), weight, rtol=0, atol=1e-7)


def test_lines_of_single_experts_have_their_positions(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, sft.S2FTConfig(density=0.1, selection="random"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "one")
    found = find_changes(str(tmp_path / "one"))
    experts = [name for name in found.names() if name.endswith("experts")]
    assert experts
    layers = adapted.base_model.adapted_layers("default")
    for name in experts:
        change, layer = found.read(name), layers[name]
        before = layer.get_base_layer().down_proj.detach().clone()
        layer.merge()
        after = layer.get_base_layer().down_proj.detach().clone()
        layer.unmerge()
        assert change.shape == tuple(before.shape)
        torch.testing.assert_close(before + change.dense(), after)
