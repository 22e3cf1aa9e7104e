"""The permuted layout: side by side while resident, the model's own order for everybody else."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model

import sft
from sft import S2FTConfig

LAYOUTS = ("index", "permuted")
FORMS = {
    "channels": {"ratio": {"down": 0.2}},
    "heads": {"ratio": {"o": 0.5}, "seed": 3},
    "both sides": {"ratio": 0.5, "roles": ["q", "k", "v", "o", "gate", "up", "down"]},
    "nested": {"ratio": {"gate": 0.1, "up": 0.3, "down": 0.2}},
}


@pytest.fixture
def build(llama, randomize):
    def make(form="channels", layout="permuted", **more):
        base = llama(num_attention_heads=4, num_key_value_heads=4)
        settings = FORMS[form] | {"attention_unit": "heads"} | more
        return get_peft_model(base, S2FTConfig(layout=layout, task_type="CAUSAL_LM", **settings))

    return make


def base_state(model):
    state = model.base_model.model.state_dict()
    return {name: t.clone() for name, t in state.items() if "s2ft_" not in name}


def as_they_lie(model):
    named = model.base_model.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "s2ft_" not in name}


@pytest.mark.parametrize("form", FORMS)
def test_s2ft_fact08_the_loss_curve_is_that_of_the_index_layout(build, batch, form) -> None:
    curves = {}
    for layout in ("index", "permuted"):
        model = build(form, layout).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
        curve = []
        with sft.resident(model):
            for _ in range(20):
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                curve.append(loss.item())
        curves[layout] = torch.tensor(curve)
    assert curves["index"][-1] < curves["index"][0] - 0.1
    torch.testing.assert_close(curves["permuted"], curves["index"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_units_lie_in_front_while_resident_and_go_back_bit_for_bit(
    build, batch, form, same, randomize
) -> None:
    model = build(form)
    randomize(model)
    before = as_they_lie(model)
    with sft.resident(model):
        model(**batch)
        assert not same(as_they_lie(model), before)
        for layer in model.base_model.adapted_layers("default").values():
            where = layer.site("default").indices
            if form != "nested":
                assert where.sort().values.tolist() == list(range(len(where)))
                assert layer.site("default").start == 0
    assert same(as_they_lie(model), before)


@pytest.mark.parametrize(
    "look",
    [
        lambda model: model.state_dict(),
        lambda model: model.base_model.model.state_dict(),
        lambda model: model.merge_adapter(),
        lambda model: model.to(torch.float64),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.adapted_layers("default")[
            "model.layers.0.mlp.down_proj"
        ].pretrained_weight(),
    ],
    ids=["state", "inner state", "merge", "move", "disable", "read"],
)
def test_whoever_reads_the_base_meets_its_own_order(build, batch, look, same) -> None:
    model = build("channels")
    before = as_they_lie(model)
    with sft.resident(model):
        model(**batch)
        assert not same(as_they_lie(model), before)
        look(model)
        found = {name: tensor.float() for name, tensor in as_they_lie(model).items()}
        assert same(found, before)


def test_a_forward_between_two_states_is_the_same(build, batch, randomize) -> None:
    model = build("both sides")
    randomize(model)
    with sft.resident(model):
        first = model(**batch).logits
        model.state_dict()
        assert torch.equal(model(**batch).logits, first)
        with model.disable_adapter():
            bare = model(**batch).logits
        assert torch.equal(model(**batch).logits, first)
    assert torch.equal(bare, model.unload()(**batch).logits)


def test_files_are_those_of_the_index_layout(build, llama, batch, randomize, tmp_path) -> None:
    for layout in ("index", "permuted"):
        model = build("both sides", layout)
        randomize(model)
        with sft.resident(model):
            model(**batch)
            model.save_pretrained(tmp_path / layout)
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in LAYOUTS]
    assert files[0] == files[1]
    base = llama(num_attention_heads=4, num_key_value_heads=4)
    loaded = PeftModel.from_pretrained(base, tmp_path / "permuted")
    expected = model(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    with sft.resident(loaded):
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert not merged._forward_pre_hooks


def test_other_adapters_and_mixed_batches_run_in_the_models_order(build, batch, randomize) -> None:
    model = build("channels").eval()
    randomize(model)
    model.add_adapter("second", S2FTConfig(ratio={"down": 0.5}, seed=2, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    randomize(model, seed=4)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(**batch).logits
    with sft.resident(model):
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            found = model(**batch).logits
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)
        mixed = model(**batch, adapter_names=["default", "second", "__base__"]).logits
        for row, name in enumerate(("default", "second")):
            torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
        found = model(**batch).logits
        torch.testing.assert_close(found, expected["default"], rtol=1e-5, atol=1e-5)


def test_backward_after_the_order_changed_is_refused(build, batch) -> None:
    model = build("channels")
    with sft.resident(model):
        loss = model(**batch).loss
        model.state_dict()
        with pytest.raises(RuntimeError, match=r"changed since|modified by an inplace"):
            loss.backward()


def test_generation_meets_the_order_too(build, batch, randomize) -> None:
    model = build("both sides").eval()
    randomize(model, scale=0.5)
    ids = batch["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with sft.resident(model):
        found = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_a_copy_keeps_an_order_of_its_own(build, batch, same, randomize) -> None:
    model = build("channels")
    randomize(model)
    before = as_they_lie(model)
    with sft.resident(model):
        first = model(**batch).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(**batch).logits, first)
    assert same(as_they_lie(model), before)
    assert not same(as_they_lie(other), before)
    other.base_model.permuted.restore()
    assert same(as_they_lie(other), before)


def test_calibration_sees_the_models_own_order(build, batch) -> None:
    found = []
    for layout in LAYOUTS:
        settings = {"selection": "activation", "calibration_batches": 1}
        model = build("channels", layout, **settings)
        with sft.resident(model):
            sft.calibrate(model, [batch])
        layers = model.base_model.adapted_layers("default").values()
        found.append([layer.s2ft_indices["default"].tolist() for layer in layers])
    assert found[0] == found[1]


def test_calibration_beside_a_permuted_adapter_sees_that_order_too(build, batch) -> None:
    """The order that an active adapter brings about is not the one that features are counted in."""
    found = []
    settings = {"ratio": {"down": 0.3}, "selection": "activation", "calibration_batches": 1}
    for resident in (False, True):
        model = build("channels", "permuted")
        model.add_adapter("second", S2FTConfig(task_type="CAUSAL_LM", **settings))
        with sft.resident(model) if resident else nullcontext():
            model(**batch)
            sft.calibrate(model, [batch], "second")
            model(**batch)
            assert bool(model.base_model.permuted._active) is resident
        layers = model.base_model.adapted_layers("second").values()
        found.append([layer.s2ft_indices["second"].tolist() for layer in layers])
    assert found[0] == found[1]
