"""Adapter files: an exact round trip, and every bad file refused whole, on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

TARGETS = ["q_proj", "down_proj"]
FIRST = "base_model.model.model.layers.0.mlp.down_proj.delta_"


@pytest.fixture
def packed(spiel, randomize, tmp_path) -> Path:
    model = spiel(target_modules=TARGETS)
    randomize(model)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def saved(spiel, packed) -> Path:
    """A file whose positions are not packed, as earlier versions wrote them."""
    file = packed / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, layer in spiel(target_modules=TARGETS).base_model.adapted_layers("default").items():
        key = f"base_model.model.{name}.delta_indices"
        tensors[key] = layer.delta_indices["default"].clone()
        assert tensors[key].dtype == torch.int32
    save_file(tensors, file)
    return packed


def test_files_of_both_kinds_load_alike(llama, packed, saved, batch) -> None:
    old = PeftModel.from_pretrained(llama(), saved)
    old.save_pretrained(packed)
    kinds = {
        key.rpartition(".")[2]: tensor.dtype
        for key, tensor in load_file(packed / "adapter_model.safetensors").items()
    }
    assert kinds["delta_indices"] == torch.uint8
    again = PeftModel.from_pretrained(llama(), packed)
    assert torch.equal(again(**batch).logits, old(**batch).logits)
    for name, tensor in old.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fact31_outputs_are_equal_after_loading(
    llama, spiel, batch, randomize, tmp_path, dtype, low_memory
) -> None:
    model = spiel(llama().to(dtype), target_modules=TARGETS, num_weights=1001)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().to(dtype), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert not any(p.requires_grad for p in again.parameters())
    for name, layer in again.base_model.adapted_layers("default").items():
        mine = model.base_model.adapted_layers("default")[name]
        assert torch.equal(layer.delta_indices["default"], mine.delta_indices["default"])
        assert layer.delta_indices["default"].dtype == torch.int32
        assert torch.equal(layer.delta_values["default"], mine.delta_values["default"])
        assert layer.delta_values["default"].dtype == torch.float32


def test_a_loaded_adapter_trains_on(llama, saved, batch) -> None:
    model = PeftModel.from_pretrained(llama(), saved, is_trainable=True)
    model(**batch).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def test_the_seed_of_the_file_does_not_matter(llama, saved, batch) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    expected = PeftModel.from_pretrained(llama(), saved)(**batch).logits
    (saved / "adapter_config.json").write_text(json.dumps(config | {"seed": 99}))
    assert torch.equal(PeftModel.from_pretrained(llama(), saved)(**batch).logits, expected)


def test_wide_indices_fit_narrow_ones(llama, saved, batch) -> None:
    expected = PeftModel.from_pretrained(llama(), saved)(**batch).logits
    tensors = load_file(saved / "adapter_model.safetensors")
    wide = {k: v.long() if k.endswith("indices") else v for k, v in tensors.items()}
    save_file(wide, saved / "adapter_model.safetensors")
    assert torch.equal(PeftModel.from_pretrained(llama(), saved)(**batch).logits, expected)


def missing(part):
    return lambda tensors: tensors.pop(FIRST + part)


def edit(part, change):
    return lambda tensors: tensors.update({FIRST + part: change(tensors[FIRST + part].clone())})


def put(at, value):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


BAD = {
    "missing values": (missing("values"), "'.*down_proj.delta_values' is missing"),
    "missing indices": (missing("indices"), "'.*down_proj.delta_indices' is missing"),
    "missing base": (missing("base"), "'.*down_proj.delta_base' is missing"),
    "an extra module": (
        lambda tensors: tensors.update({FIRST.replace("0", "7") + "values": torch.ones(3)}),
        r"layers.7.mlp.down_proj.delta_values.*' has no place in this model \(1 such",
    ),
    "an extra part": (
        lambda tensors: tensors.update({FIRST + "scale": torch.ones(3)}),
        "delta_scale.*' has no place in this model",
    ),
    "unsorted": (edit("indices", lambda t: t.flip(0)), "strictly ascending"),
    "duplicate": (edit("indices", lambda t: put(1, t[0])(t)), "strictly ascending"),
    "negative": (edit("indices", put(0, -1)), r"position -1 is outside \[0, 2048\)"),
    "out of range": (edit("indices", put(-1, 2048)), r"position 2048 is outside \[0, 2048\)"),
    "short values": (edit("values", lambda t: t[:-1].clone()), r"delta_values holds \(204,\) ent"),
    "long indices": (
        edit("indices", lambda t: torch.arange(206)),
        r"delta_indices holds \(206,\) entries, its adapter_config.json gives \(205,\)",
    ),
    "values of two dimensions": (edit("values", lambda t: t[None]), r"holds \(1, 205\) entries"),
    "float indices": (edit("indices", lambda t: t.float()), "got torch.float32 of 1 dimensions"),
    "integer values": (edit("values", lambda t: t.int()), "delta_values is torch.int32, allowed"),
    "another base": (edit("base", lambda t: t + 1), "was trained on another base weight"),
    "two fingerprints": (edit("base", lambda t: t.repeat(2)), r"delta_base holds torch\.int64 \(2"),
    "a float fingerprint": (edit("base", lambda t: t.double()), r"delta_base holds torch\.float64"),
}


@pytest.mark.parametrize("harm, message", BAD.values(), ids=BAD)
def test_fact31_bad_files_are_refused(llama, saved, harm, message, base_weights, same) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    base = llama()
    before = base_weights(base)
    with pytest.raises(ValueError, match=f"^adapter file: .*{message}") as caught:
        PeftModel.from_pretrained(base, saved)
    assert "\n" not in str(caught.value)
    after = {name.replace(".base_layer.", "."): p for name, p in base_weights(base).items()}
    assert same(after, before)


@pytest.mark.parametrize("harm, message", BAD.values(), ids=BAD)
def test_a_refused_file_leaves_the_adapter_in_place(
    saved, spiel, batch, randomize, harm, message
) -> None:
    model = spiel(target_modules=TARGETS, seed=5)
    randomize(model, seed=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(**batch).logits
    tensors = load_file(saved / "adapter_model.safetensors")
    harm(tensors)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model(**batch).logits, logits)


def test_another_model_is_refused(llama, saved) -> None:
    with pytest.raises(ValueError, match="was trained on another base weight"):
        torch.manual_seed(1)
        other = llama()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        PeftModel.from_pretrained(other, saved)
    with pytest.raises(ValueError, match="adapter file"):
        PeftModel.from_pretrained(llama(num_hidden_layers=3), saved)
    with pytest.raises(ValueError, match="adapter file"):
        PeftModel.from_pretrained(llama(num_hidden_layers=1), saved)


def test_loading_while_resident_meets_the_pre_trained_weight(
    saved, spiel, batch, randomize, base_weights, same
) -> None:
    import sft

    model = spiel(target_modules=TARGETS, seed=5)
    before = base_weights(model)
    randomize(model, seed=6)
    with sft.resident(model):
        model(**batch)
        set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))
        loaded = model(**batch).logits
    assert same(base_weights(model), before)
    torch.testing.assert_close(model(**batch).logits, loaded, rtol=1e-4, atol=1e-5)


def test_supports_stay_when_an_adapter_is_loaded_beside(llama, saved, spiel, batch) -> None:
    model = spiel(target_modules=TARGETS, seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_adapter(saved, "loaded")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.set_adapter("loaded")
    expected = PeftModel.from_pretrained(llama(), saved)(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
