"""Composed adapters: what PEFT loads is the algebra of the deltas, of one base alone."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

import sft
from sft.errors import UserError
from sft.tools.algebra import Request
from sft.tools.compose import compose

TWO = (1.0, 1.0)


@pytest.mark.parametrize(
    "methods", [("spiel", "spiel"), ("spiel", "s2ft"), ("s2ft", "sora"), ("lora", "sltrain")]
)
def test_a_sum_is_the_sum_of_the_deltas(saved, deltas, tmp_path, methods) -> None:
    one, two = saved("one", methods[0]), saved("another", methods[1])
    compose([one, two], Request("add", (1.0, -0.5)), out=tmp_path / "out")
    first, second, found = deltas(one), deltas(two), deltas(tmp_path / "out")
    assert set(found) == set(first) | set(second)
    for name, delta in found.items():
        zero = torch.zeros_like(delta)
        wanted = first.get(name, zero) - 0.5 * second.get(name, zero)
        torch.testing.assert_close(delta, wanted, rtol=0, atol=1e-9)


def test_the_result_is_a_static_spiel_delta_that_merges(saved, loaded, deltas, tmp_path) -> None:
    folders = [saved("one"), saved("two", seed=1)]
    compose(folders, Request("add", TWO), out=tmp_path / "out")
    model = loaded(tmp_path / "out")
    config = model.peft_config["default"]
    assert (config.peft_type.value, config.growth) == ("SPIEL", "none")
    counts = {n: la.delta_values["default"].numel() for n, la in sft_layers(model).items()}
    assert config.num_weights_by_module == counts and len(set(counts.values())) > 1
    before = {n: la.get_base_layer().weight.clone() for n, la in sft_layers(model).items()}
    added = deltas(tmp_path / "out")
    merged = model.merge_and_unload()
    for name, weight in before.items():
        assert torch.equal(merged.get_submodule(name).weight, weight + added[name])


def sft_layers(model):
    return model.base_model.adapted_layers("default")


def test_order_does_not_matter_to_a_sum(saved, tmp_path) -> None:
    folders = [saved("one"), saved("two", seed=1)]
    for name, order in (("a", folders), ("b", folders[::-1])):
        compose(order, Request("add", TWO), out=tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_what_is_composed_composes_again(saved, deltas, tmp_path) -> None:
    one, two = saved("one"), saved("two", seed=1)
    compose([one, two], Request("add", TWO), out=tmp_path / "sum")
    compose([tmp_path / "sum", two], Request("subtract", TWO), out=tmp_path / "back")
    first = deltas(one)
    for name, delta in deltas(tmp_path / "back").items():
        torch.testing.assert_close(delta, first[name], rtol=0, atol=1e-8)


def test_scaling_by_minus_one_negates(saved, deltas, tmp_path) -> None:
    folder = saved("one")
    compose([folder], Request("scale", (-1.0,)), out=tmp_path / "out")
    found = deltas(tmp_path / "out")
    assert all(torch.equal(found[name], -delta) for name, delta in deltas(folder).items())


def test_the_base_is_not_read(saved, base, tmp_path) -> None:
    folders = [saved("one"), saved("two", "lora")]
    (base / "model.safetensors").unlink()
    assert compose(folders, Request("add", TWO), out=tmp_path / "out").changes


def test_conflicts_are_counted(saved, tmp_path) -> None:
    one, two = saved("one"), saved("two")  # one support, other values
    done = compose([one, two], Request("add", TWO), out=tmp_path / "out")
    found = done.conflicts[0, 1]
    assert found["jaccard"] == 1.0 and 0.3 < found["conflict"] < 0.7


def test_modules_of_which_nothing_is_left_are_left_out(saved, loaded, tmp_path) -> None:
    one = saved("one", target_modules=["q_proj", "k_proj"], density=0.5)
    two = saved("two", target_modules=["q_proj", "v_proj"], density=0.5)
    done = compose([one, two], Request("intersect", TWO), out=tmp_path / "out")
    assert {name.rpartition(".")[2] for name in done.changes} == {"q_proj"}
    assert {name.rpartition(".")[2] for name in done.dropped} == {"k_proj", "v_proj"}
    assert set(sft_layers(loaded(tmp_path / "out"))) == set(done.changes)


def test_adapters_with_nothing_in_common_do_not_intersect(saved, tmp_path) -> None:
    one = saved("one", target_modules=["q_proj"])
    two = saved("two", target_modules=["k_proj"])
    with pytest.raises(UserError, match="intersect: nothing is left in any module"):
        compose([one, two], Request("intersect", TWO), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_weights_are_refused(saved, llama, tmp_path) -> None:
    other = llama()
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    folders = [saved("one"), saved("two", over=tmp_path / "other")]
    with pytest.raises(UserError, match=r"different weights of model.layers.1.mlp.up_proj"):
        compose(folders, Request("add", TWO), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_comes_along_where_adapters_agree_on_it(base, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    def save(name: str, head: float):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        config = sft.SpielConfig(density=0.1, task_type="SEQ_CLS", init_weights=False)
        adapted = get_peft_model(model, config)
        torch.nn.init.constant_(adapted.base_model.model.score.modules_to_save.default.weight, head)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    one, same, other = save("one", 1.0), save("same", 1.0), save("other", 2.0)
    compose([one, same], Request("add", TWO), out=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and "score" in settings["modules_to_save"]
    from sft.tools.opened import open_adapter

    assert float(open_adapter(tmp_path / "out").whole()["score.weight"].detach().mean()) == 1.0
    with pytest.raises(UserError, match=r"score.weight was trained whole in several"):
        compose([one, other], Request("add", TWO), out=tmp_path / "bad")


def test_the_tokenizer_and_a_record_come_along(saved, tiny_tokenizer, tmp_path) -> None:
    one = saved("one")
    tiny_tokenizer.chat_template = "{{ messages }}"
    tiny_tokenizer.save_pretrained(one)
    compose([one], Request("prune", (1.0,), 0.5), out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    record = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert record["operation"] == "prune" and record["adapters"] == [str(one)]


def test_a_filled_folder_is_kept(saved, tmp_path) -> None:
    one = saved("one")
    with pytest.raises(UserError, match="is not empty"):
        compose([one], Request("scale", (1.0,)), out=one)
    compose([one], Request("scale", (1.0,)), out=tmp_path / "out")
    compose([one], Request("scale", (2.0,)), out=tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="would replace"):
        compose([one], Request("scale", (1.0,)), out=one, overwrite=True)


def test_every_module_may_have_its_own_number_of_weights(llama) -> None:
    counts = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.up_proj": 700}
    config = sft.SpielConfig(num_weights_by_module=counts, target_modules=sorted(counts))
    model = get_peft_model(llama(), config)
    assert {n: len(la.support("default")) for n, la in sft_layers(model).items()} == counts
    assert config.num_weights == 703 and config.density is None


@pytest.mark.parametrize(
    ("counts", "more", "message"),
    [
        ({}, {}, "num_weights_by_module: got {}, allowed is whole numbers"),
        ({"q": 1.5}, {}, "allowed is whole numbers by name"),
        ({"q": 0}, {}, "num_weights_by_module: got 0, allowed is at least 1"),
        ({"q": 2}, {"num_weights": 3}, "num_weights: got 3, allowed is 2, the sum of"),
        ({"q": 2}, {"density": 0.1}, "set exactly one of them"),
    ],
    ids=["none", "fraction", "zero", "sum", "density"],
)
def test_counts_that_are_none(counts, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        sft.SpielConfig(num_weights_by_module=counts, **more)


def test_counts_that_do_not_fit_the_model(llama) -> None:
    name = "model.layers.0.self_attn.q_proj"
    for counts, message in (
        ({name: 2000}, "got 2000 for .*q_proj', which has 1024 weights"),
        ({name: 2, "x": 2}, "'x' is in only one of it and target_modules"),
    ):
        config = sft.SpielConfig(num_weights_by_module=counts, target_modules=[name])
        with pytest.raises(ValueError, match=message):
            get_peft_model(llama(), config)
