"""SLTrain beside a frozen weight: start, files, forms of c, placement."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import sft
from sft import SLTrainConfig

FILE = "adapter_model.safetensors"


@pytest.fixture
def sltrain(llama):
    def build(base=None, **fields):
        fields = {"r": 4, "density": 0.1, "task_type": "CAUSAL_LM"} | fields
        return get_peft_model(llama() if base is None else base, SLTrainConfig(**fields))

    return build


def layers(model):
    return model.base_model.adapted_layers("default")


@pytest.mark.parametrize("trainable", [False, True])
def test_fact23_training_starts_at_the_base(llama, gpt2, sltrain, batch, trainable) -> None:
    for base in (llama, gpt2):
        expected = base()(**batch).logits
        model = sltrain(base(), trainable_scale=trainable)
        assert torch.equal(model(**batch).logits, expected)
        with sft.resident(model):
            assert torch.equal(model(**batch).logits, expected)


def test_the_budget_is_of_each_matrix(sltrain) -> None:
    model = sltrain(density=0.03)
    for layer in layers(model).values():
        rows, cols = layer.shape
        assert layer.sltrain_values["default"].numel() == int(0.03 * rows * cols)
        assert layer.sltrain_indices["default"].dtype == torch.int32
        assert layer.sltrain_a["default"].abs().max() <= 1 / layer.in_features**0.5
    shared = sltrain(density=None, num_weights=500)
    assert sum(la.sltrain_values["default"].numel() for la in layers(shared).values()) == 500


@pytest.mark.parametrize("selection", ["random", "magnitude"])
def test_fact22_the_support_follows_from_the_seed(llama, sltrain, selection) -> None:
    one, other = sltrain(seed=3, selection=selection), sltrain(seed=3, selection=selection)
    for name, layer in layers(one).items():
        assert torch.equal(layer.support("default"), layers(other)[name].support("default"))


@pytest.mark.parametrize("kernel", ["compose", "factored", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_kernels_and_modes_agree(request, sltrain, randomize, batch, kernel, name) -> None:
    model = sltrain(request.getfixturevalue(name)(), kernel=kernel, trainable_scale=True)
    randomize(model)
    aside = model(**batch).logits
    with sft.resident(model):
        torch.testing.assert_close(model(**batch).logits, aside, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, aside, rtol=1e-4, atol=1e-5)


def test_resident_gradients_are_those_beside(sltrain, randomize, batch) -> None:
    model = sltrain(trainable_scale=True)
    randomize(model)
    found = []
    for resident in (False, True):
        model.zero_grad(set_to_none=True)
        if resident:
            with sft.resident(model):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("sltrain_scale" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_random_positions_are_not_in_the_file(llama, sltrain, randomize, batch, tmp_path) -> None:
    model = sltrain()
    randomize(model)
    for store, name in ((False, "seed"), (True, "stored")):
        model.peft_config["default"].store_indices = store
        model.save_pretrained(tmp_path / name)
        held = any("sltrain_indices" in key for key in load_file(tmp_path / name / FILE))
        assert held == store
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "seed")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    stored = sltrain(selection="magnitude")
    stored.save_pretrained(tmp_path / "magnitude")
    assert any("sltrain_indices" in key for key in load_file(tmp_path / "magnitude" / FILE))


def test_low_memory_loading_gives_the_same(llama, sltrain, randomize, batch, tmp_path) -> None:
    for store in (False, True):
        model = sltrain(store_indices=store)
        randomize(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_another_support_is_refused(llama, sltrain, tmp_path) -> None:
    sltrain().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if "sltrain_base" in key)
    tensors[key][1] += 1
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its support differs from the one that seed"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_calibrated_support_is_chosen_by_gradients(sltrain, batch, llama, tmp_path) -> None:
    model = sltrain(selection="gradient", calibration_batches=1)
    before = [layer.support("default").clone() for layer in layers(model).values()]
    with pytest.raises(RuntimeError, match="placeholder support"):
        model.train()(**batch)
    sft.calibrate(model, [batch])
    after = [layer.support("default") for layer in layers(model).values()]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.train()(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(llama(), tmp_path)


def test_scales_have_a_group_without_decay(sltrain) -> None:
    model = sltrain(trainable_scale=True)
    (group,) = model.base_model.parameter_groups("default", 0.1)
    assert len(group["params"]) == len(layers(model))
    assert (group["weight_decay"], group["lr"]) == (0.0, 0.1)
    assert sltrain().base_model.parameter_groups("default", 0.1) == []


def test_scale_starts_at_tanh_of_one(sltrain, randomize) -> None:
    fixed, trained = sltrain(alpha=8.0), sltrain(trainable_scale=True)
    for model, c in ((fixed, 2.0), (trained, 0.7615942)):
        for layer in layers(model).values():
            with torch.no_grad():
                layer.sltrain_b["default"].fill_(1.0)
            product = layer.sltrain_b["default"] @ layer.sltrain_a["default"]
            torch.testing.assert_close(layer.get_delta_weight("default"), c * product)


def test_what_is_trained_is_logged(sltrain, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="sft"):
        sltrain()
    # r (m + n) of four 32 x 32 and three 64 x 32 matrices, in two layers
    low_rank, sparse = 2 * 4 * (4 * 64 + 3 * 96), 2 * (4 * 102 + 3 * 204)
    found = f"{low_rank:,} low-rank, {sparse:,} sparse and 0 other trained parameters in 14"
    assert found in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"^r: got 0, allowed is a whole number of at least 1$"),
        ({"r": 2.5}, r"^r: got 2\.5, "),
        ({"alpha": 0}, r"^alpha: got 0, "),
        ({"alpha": True}, r"^alpha: got True, "),
        ({"trainable_scale": 1}, r"^trainable_scale: got 1, allowed is true or false$"),
        ({"per_layer_updates": "no"}, r"^per_layer_updates: got 'no', allowed is true or false$"),
        ({"form": "scratch"}, r"^form: got 'scratch', allowed is finetune or pretrain$"),
        ({"kernel": "dense"}, r"^kernel: got 'dense', allowed is auto, compose, factored$"),
        ({"store_indices": "no"}, r"^store_indices: got 'no', "),
        ({"store_indices": False, "selection": "magnitude"}, r"^store_indices: got False, "),
        ({"form": "pretrain", "selection": "magnitude"}, r"^selection: got 'magnitude', "),
        ({"form": "pretrain", "modules_to_save": ["lm_head"]}, r"^modules_to_save: got "),
        ({"density": 0.0}, r"^density: got 0\.0, "),
        ({"density": 1e-6}, r"^density: 1e-06 leaves no weight for "),
        ({"target_modules": ["embed_tokens"]}, r"^target_modules: .* is a Embedding, "),
    ],
)
def test_bad_settings_are_named(sltrain, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        sltrain(**fields)
