"""What every method on disk promises; a new file under adapters/methods/ is tested by existing."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.registry import config_class, method_names
from sft.adapters.support import support_hash

DENSITY = 0.1


@pytest.fixture(params=method_names())
def method(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request, llama):
    """Build the base anew at each call, in fp32 or bf16."""
    return lambda: llama().to(request.param)


def adapt(base, method: str, **fields):
    config = config_class(method)(density=DENSITY, task_type="CAUSAL_LM", **fields)
    return get_peft_model(base(), config)


@pytest.fixture
def trained(base, method, randomize):
    model = adapt(base, method)
    randomize(model)
    return model


def test_attaching_changes_no_output(base, method, batch) -> None:
    expected = base()(**batch).logits
    model = adapt(base, method)
    assert torch.equal(model(**batch).logits, expected)
    with sft.resident(model):
        assert torch.equal(model(**batch).logits, expected)


def test_only_its_parameters_train(base, method, batch) -> None:
    model = adapt(base, method).train()
    prefix = f".{model.base_model.prefix}"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(prefix in name for name in trainable)
    for mode in ("aside", "resident"):
        if mode == "resident":
            with sft.resident(model):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable
        model.zero_grad(set_to_none=True)


def test_trainable_count_is_the_budget(base, method) -> None:
    model = adapt(base, method)
    targeted = sum(layer.get_base_layer().weight.numel() for layer in sparse_layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == round(DENSITY * targeted)


def test_gradients_are_the_dense_ones_gathered(llama, method, batch, randomize) -> None:
    model = adapt(llama, method)
    randomize(model)
    dense = adapt(llama, method)
    dense.load_state_dict(model.state_dict())
    dense = dense.merge_and_unload().requires_grad_()
    dense(**batch).loss.backward()
    for mode in ("aside", "resident"):
        if mode == "resident":
            with sft.resident(model):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        for name, layer in model.base_model.adapted_layers("default").items():
            where = layer.delta_indices["default"].long()
            expected = dense.get_submodule(name).weight.grad.flatten()[where]
            found = layer.delta_values["default"].grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=f"{mode} {name}")
        model.zero_grad(set_to_none=True)


def test_merging_is_the_resident_forward_and_undone_bit_for_bit(
    trained, batch, base_weights, same
) -> None:
    before, bare = base_weights(trained), trained(**batch).logits
    with sft.resident(trained):
        resident = trained(**batch).logits
    assert same(base_weights(trained), before)
    trained.merge_adapter()
    assert torch.equal(trained(**batch).logits, resident)
    assert not same(base_weights(trained), before)
    trained.unmerge_adapter()
    assert same(base_weights(trained), before)
    assert torch.equal(trained(**batch).logits, bare)


def test_a_saved_adapter_is_the_one_loaded(trained, base, batch, tmp_path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(**batch).logits, trained(**batch).logits)
    assert supports(loaded) == supports(trained)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def supports(model) -> str:
    layers = sparse_layers(model).items()
    return support_hash((name, layer.delta_indices["default"]) for name, layer in layers)


def test_same_seed_same_support(llama, method) -> None:
    found = []
    for state, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(state)
        found.append(supports(adapt(llama, method, seed=seed)))
        half = supports(adapt(lambda: llama().bfloat16(), method, seed=seed))
        assert half == found[-1]
    assert found[0] == found[1] != found[2]


def test_disabled_it_is_the_base(trained, base, batch) -> None:
    expected = base()(**batch).logits
    assert not torch.equal(trained(**batch).logits, expected)
    with trained.disable_adapter():
        assert torch.equal(trained(**batch).logits, expected)
    with sft.resident(trained):
        trained(**batch)
        with trained.disable_adapter():
            assert torch.equal(trained(**batch).logits, expected)
        assert not torch.equal(trained(**batch).logits, expected)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_leaves_no_trace(trained, base, batch, merge) -> None:
    trained(**batch)
    bare = base()
    with sft.resident(trained):
        expected = trained(**batch).logits if merge else bare(**batch).logits
    plain = trained.merge_and_unload() if merge else trained.unload()
    assert type(plain) is type(bare)
    kinds = [(name, type(module)) for name, module in plain.named_modules()]
    assert kinds == [(name, type(module)) for name, module in bare.named_modules()]
    assert plain.state_dict().keys() == bare.state_dict().keys()
    assert all(p.is_leaf and p.grad is None for p in plain.parameters())
    assert not hasattr(plain, "peft_config")
    assert not any("delta" in name for module in plain.modules() for name in vars(module))
    assert torch.equal(plain(**batch).logits, expected)


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
