"""What every method on disk promises; a new file under adapters/methods/ is tested by existing."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.registry import config_class, method_names
from sft.adapters.support import fingerprint

FILE = "adapter_model.safetensors"


@pytest.fixture(params=method_names())
def method(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request, llama):
    """Build the base anew at each call, in fp32 or bf16."""
    return lambda: llama().to(request.param)


def adapt(base, method: str, **settings):
    """Adapt a tiny base with a method's defaults, and a tenth of the weights where it asks."""
    owner = config_class(method)
    if "density" in {field.name for field in fields(owner)}:
        settings.setdefault("density", 0.1)
    return get_peft_model(base(), owner(task_type="CAUSAL_LM", **settings))


@pytest.fixture
def trained(base, method, randomize):
    model = adapt(base, method)
    randomize(model)
    return model


def in_both_modes(model):
    """Yield aside, then inside resident mode."""
    yield "aside"
    with sft.resident(model):
        yield "resident"


def tensors(model) -> dict[str, torch.Tensor]:
    prefix = f".{model.base_model.prefix}"
    return {name: t.clone() for name, t in model.state_dict().items() if prefix in name}


def test_attaching_changes_no_output(base, method, batch) -> None:
    expected = base()(**batch).logits
    model = adapt(base, method)
    for mode in in_both_modes(model):
        assert torch.equal(model(**batch).logits, expected), mode


def test_only_its_parameters_train(base, method, batch) -> None:
    model = adapt(base, method).train()
    prefix = f".{model.base_model.prefix}"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(prefix in name for name in trainable)
    for mode in in_both_modes(model):
        model(**batch).loss.backward()
        found = {name for name, p in model.named_parameters() if p.grad is not None}
        assert found == trainable, mode
        model.zero_grad(set_to_none=True)


def test_what_is_counted_is_what_is_saved(base, method, tmp_path) -> None:
    model = adapt(base, method)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE).values()
    trained = sum(t.numel() for t in saved if t.is_floating_point())
    assert model.get_nb_trainable_parameters()[0] == trained > 0


def test_gradients_are_those_of_finite_differences(llama, method, randomize) -> None:
    model = adapt(lambda: llama().double(), method)
    randomize(model, scale=0.5)
    generator = torch.Generator().manual_seed(3)
    for layer in list(model.base_model.adapted_layers("default").values())[:7]:
        x = torch.randn(2, 5, layer.in_features, generator=generator, dtype=torch.float64)
        weights = torch.randn(2, 5, layer.out_features, generator=generator, dtype=torch.float64)
        inputs = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
        for mode in in_both_modes(model):
            gradients = torch.autograd.grad((layer(x) * weights).sum(), inputs)
            for tensor, gradient in zip(inputs, gradients, strict=True):
                slope = central_difference(lambda: (layer(x) * weights).sum(), tensor, gradient)  # noqa: B023
                torch.testing.assert_close(slope, gradient.square().sum(), rtol=1e-6, atol=1e-8)
                assert gradient.any(), mode


@torch.no_grad()
def central_difference(function, tensor: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Slope of a function of a tensor along a direction, read from both sides."""
    kept, values = tensor.clone(), []
    for shift in (1e-5, -1e-5):
        tensor.copy_(kept + shift * direction)
        values.append(function())
    tensor.copy_(kept)
    return (values[0] - values[1]) / 2e-5


def test_merging_is_the_resident_forward_and_undone_bit_for_bit(
    trained, batch, base_weights, same
) -> None:
    before, bare = base_weights(trained), trained(**batch).logits
    with sft.resident(trained):
        resident = trained(**batch).logits
    assert same(base_weights(trained), before)
    trained.merge_adapter()
    merged = trained(**batch).logits
    if merges_what_is_resident(trained):
        assert torch.equal(merged, resident)
    else:
        # the whole delta was rounded into W once
        rounding = 50 * torch.finfo(merged.dtype).eps
        torch.testing.assert_close(merged, resident, rtol=rounding, atol=rounding)
    assert not same(base_weights(trained), before)
    trained.unmerge_adapter()
    assert same(base_weights(trained), before)
    assert torch.equal(trained(**batch).logits, bare)


def merges_what_is_resident(model) -> bool:
    layers = model.base_model.adapted_layers("default").values()
    return all(layer.merges_exactly("default") for layer in layers)


def test_a_backward_from_before_a_merge_is_refused(llama, method, batch, randomize) -> None:
    model = adapt(llama, method)
    randomize(model)
    for change in (model.merge_adapter, model.unmerge_adapter):
        model.base_model.requires_grad_(True)
        loss = model(**batch).loss
        change()
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed since"):
            loss.backward()


def test_what_is_merged_is_not_taken_for_the_base(llama, method, randomize) -> None:
    model = adapt(llama, method)
    randomize(model)
    layers = model.base_model.adapted_layers("default").values()
    expected = [fingerprint(layer.get_base_layer().weight) for layer in layers]
    saved = get_peft_model_state_dict(model)
    model.merge_adapter()
    assert [fingerprint(layer.get_base_layer().weight) for layer in layers] != expected
    assert [layer.made_for("default") for layer in layers] == expected
    set_peft_model_state_dict(model, saved)  # refused, if the merged weight were the base


def test_merging_adds_the_delta_weight(trained) -> None:
    for layer in trained.base_model.adapted_layers("default").values():
        before = layer.get_base_layer().weight.detach().clone()
        delta = layer.get_delta_weight("default")
        layer.merge()
        expected = (before.float() + delta.float()).to(before.dtype)
        assert delta.shape == before.shape
        assert delta.any()
        torch.testing.assert_close(layer.get_base_layer().weight, expected, rtol=1e-6, atol=1e-7)


def test_exact_factors_multiply_to_the_delta_weight(trained) -> None:
    for layer in trained.base_model.adapted_layers("default").values():
        factors = layer.low_rank("default")
        assert layer.supports_lora_conversion("default") == (factors is not None)
        if factors is not None:
            delta = layer.get_delta_weight("default").float()
            torch.testing.assert_close(factors[1] @ factors[0], delta, rtol=1e-5, atol=1e-7)


def test_a_saved_adapter_is_the_one_loaded(trained, base, batch, same, tmp_path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(**batch).logits, trained(**batch).logits)
    assert same(tensors(loaded), tensors(trained))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_is_loaded_to_be_used_does_not_train(llama, method, tmp_path, low_memory) -> None:
    # the file is in bfloat16, its tensors are cast to float32 on the way in
    adapt(llama, method).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {t.dtype for t in tensors(loaded).values() if t.is_floating_point()} == {torch.float32}


def test_a_file_for_another_model_is_refused(trained, method, llama, tmp_path) -> None:
    trained.save_pretrained(tmp_path)
    others = [{"hidden_size": 48}, {"num_hidden_layers": 1}]
    if method != "sora":  # ranks are no share of the model: more layers may stay as they are
        others.append({"num_hidden_layers": 3})
    for changes in others:
        with pytest.raises(ValueError, match=r"^[\w ]+: .*"):
            PeftModel.from_pretrained(llama(**changes), tmp_path)


def test_same_seed_same_adapter(llama, method, same) -> None:
    found = []
    for state, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(state)
        found.append(tensors(adapt(llama, method, seed=seed)))
        half = tensors(adapt(lambda: llama().bfloat16(), method, seed=seed))
        assert same(half, found[-1])
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_attaching_leaves_the_global_random_state_alone(llama, method) -> None:
    base = llama()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    adapt(lambda: base, method)
    assert torch.equal(torch.get_rng_state(), before)


def test_disabled_it_is_the_base(trained, base, batch) -> None:
    expected = base()(**batch).logits
    for mode in in_both_modes(trained):
        assert not torch.equal(trained(**batch).logits, expected), mode
        with trained.disable_adapter():
            assert torch.equal(trained(**batch).logits, expected), mode
        assert not torch.equal(trained(**batch).logits, expected), mode


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_leaves_no_trace(trained, base, batch, merge) -> None:
    trained(**batch)
    bare, prefix = base(), trained.base_model.prefix
    with sft.resident(trained):
        expected = trained(**batch).logits if merge else bare(**batch).logits
    exact = not merge or merges_what_is_resident(trained)
    plain = trained.merge_and_unload() if merge else trained.unload()
    assert type(plain) is type(bare)
    kinds = [(name, type(module)) for name, module in plain.named_modules()]
    assert kinds == [(name, type(module)) for name, module in bare.named_modules()]
    assert plain.state_dict().keys() == bare.state_dict().keys()
    assert all(p.is_leaf and p.grad is None for p in plain.parameters())
    assert not hasattr(plain, "peft_config")
    assert not any(prefix in name for module in plain.modules() for name in vars(module))
    rounding = 0.0 if exact else 50 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=rounding, atol=rounding)


def test_a_second_adapter_stands_beside_the_first(trained, batch, randomize) -> None:
    first = trained(**batch).logits
    trained.add_adapter("second", trained.peft_config["default"])
    trained.set_adapter("second")
    randomize(trained, seed=8)
    second = trained(**batch).logits
    assert not torch.equal(first, second)
    trained.set_adapter("default")
    assert torch.equal(trained(**batch).logits, first)
    trained.delete_adapter("second")
    assert torch.equal(trained(**batch).logits, first)


def test_switching_adapters_while_resident_is_exact(trained, batch, randomize) -> None:
    trained.add_adapter("second", trained.peft_config["default"])
    trained.set_adapter("second")
    randomize(trained, seed=8)
    alone = {}
    for name in ("default", "second"):
        trained.set_adapter(name)
        with sft.resident(trained):
            alone[name] = trained(**batch).logits
    with sft.resident(trained):
        for name in ("default", "second", "default", "second"):
            trained.set_adapter(name)
            assert torch.equal(trained(**batch).logits, alone[name])


def test_each_row_of_a_batch_may_have_its_own_adapter(llama, method, batch, randomize) -> None:
    model = adapt(llama, method)
    randomize(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    randomize(model, seed=8)
    model.eval()
    ids, names = batch["input_ids"], ["second", "__base__", "default"]
    found = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(input_ids=ids[row : row + 1]).logits
        else:
            model.set_adapter(name)
            expected = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^adapter_names: got 'third', allowed are default"):
        model(input_ids=ids, adapter_names=["third", "default", "default"])
    with pytest.raises(ValueError, match=r"^adapter_names: got 2 names for 3 rows"):
        model(input_ids=ids, adapter_names=["default", "default"])


def test_beam_search_keeps_each_rows_adapter(llama, method, batch, randomize) -> None:
    model = adapt(llama, method)
    randomize(model, scale=0.5)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    randomize(model, scale=0.5, seed=8)
    model.eval()
    ids = batch["input_ids"][:2]
    search = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    search |= {"eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    mixed = model.generate(ids, adapter_names=["second", "default"], **search)
    alone = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        alone[name] = model.generate(ids, **search)
    assert torch.equal(mixed[0], alone["second"][0])
    assert torch.equal(mixed[1], alone["default"][1])
    assert not torch.equal(alone["second"], alone["default"])


def test_layers_can_be_moved_and_copied(trained, batch) -> None:
    expected = trained(**batch).logits
    assert torch.equal(trained.to("cpu")(**batch).logits, expected)
    for layer in sparse_layers(trained).values():
        assert "adapters" in repr(layer)
