"""Effective weights in W while it lasts, the base bit for bit before, between and after."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident, leave_resident, sync_resident
from sft.kernels.compose import compose

KINDS = ["linear", "conv1d", "embedding"]
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def trained(request, llama, spiel, randomize):
    """An adapted model whose deltas are not zero, in fp32 or bf16, with fp32 deltas."""
    model = spiel(llama().to(request.param), target_modules=TARGETS)
    randomize(model)
    for layer in sparse_layers(model).values():
        assert layer.delta_values["default"].dtype == torch.float32
    return model


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if kind == "embedding":
        return torch.tensor([[0, 3, 5], [5, 1, 2]])
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def dense_twin(layer):
    """The bare base layer with compose(w0, delta) in its weight."""
    twin = copy.deepcopy(layer.get_base_layer())
    flat, where = twin.weight.data.view(-1), layer.delta_indices["default"].long()
    values = layer.delta_values["default"].detach()
    flat[where] = compose(flat[where], values, reference=layer.reference)
    return twin


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, bias", [("linear", True), ("linear", False), ("conv1d", True), ("embedding", False)]
)
def test_fact05_forward_is_that_of_the_composed_weight(make_layer, kind, bias, dtype, reference):
    layer = make_layer(kind, bias=bias, dtype=dtype, reference=reference)
    x, twin = inputs(kind, dtype), dense_twin(layer)
    with sft.resident(layer):
        assert torch.equal(layer(x), twin(x))
        assert torch.equal(layer.get_base_layer().weight, twin.weight)


def test_fact05_in_a_model(trained, batch) -> None:
    twin = copy.deepcopy(trained).merge_and_unload()
    with sft.resident(trained):
        resident = trained(**batch).logits
    assert torch.equal(resident, twin(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fact01_zero_deltas_change_no_output(llama, spiel, batch, dtype) -> None:
    expected = llama().to(dtype)(**batch).logits
    model = spiel(llama().to(dtype), target_modules=TARGETS)
    assert torch.equal(model(**batch).logits, expected)
    with sft.resident(model):
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_aside_equals_resident_to_rounding(make_layer, kind) -> None:
    layer, x = make_layer(kind, dtype=torch.float64), inputs(kind, torch.float64)
    layer.delta_values["default"].data = layer.delta_values["default"].data.double()
    values, outcomes = layer.delta_values["default"], []
    for mode in ("aside", "resident"):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), values)
        outcomes.append((y.detach(), gradient))
        if mode == "aside":
            layer.enter_resident()
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


def test_fact09_training_moves_nothing_outside_the_support(trained, batch, base_weights) -> None:
    before = base_weights(trained)
    optimizer = torch.optim.AdamW(
        [p for p in trained.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    with sft.resident(trained.train()):
        for _ in range(3):
            trained(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sync_resident(trained)
        during = base_weights(trained)
        assert all(p.grad is None for n, p in trained.named_parameters() if ".delta_" not in n)
    layers = trained.base_model.adapted_layers("default")
    for name, weight in before.items():
        outside = torch.ones(weight.numel(), dtype=torch.bool)
        module = name.removesuffix(".weight")
        if module in layers:
            outside[layers[module].delta_indices["default"].long()] = False
            assert not torch.equal(during[name], weight)
        assert torch.equal(during[name].view(-1)[outside], weight.view(-1)[outside]), name


def change(layer, source, seed=0):
    """Replace the slots whose source is -1 by unused positions."""
    old, numel = layer.delta_indices["default"].long(), layer.shape[0] * layer.shape[1]
    free = torch.tensor([j for j in range(numel) if j not in set(old.tolist())])
    kept, slots = old[source >= 0], torch.arange(len(old))[source >= 0]
    grown = free[torch.randperm(len(free))[: len(old) - len(kept)]]
    positions, order = torch.cat([kept, grown]).sort()
    layer.replace_support(
        "default", positions, torch.cat([slots, torch.full((len(grown),), -1)])[order]
    )
    return old[source < 0], grown


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fact11_fact12_fact13_drop_and_grow_in_place(make_layer, dtype, resident) -> None:
    layer = make_layer("linear", dtype=dtype)
    weight, parameter = layer.get_base_layer().weight, layer.delta_values["default"]
    before, x = weight.clone(), inputs("linear", dtype)
    if resident:
        layer.enter_resident()
    # fact 12: growth alone, from slots whose delta is zero, changes no output
    with torch.no_grad():
        parameter[[1, 4]] = 0.0
    silent, source = layer(x), torch.arange(9)
    source[[1, 4]] = -1
    change(layer, source)
    assert torch.equal(layer(x), silent)
    # fact 11: what is dropped is the pre-trained weight again, what is grown still is
    old = dict(zip(layer.delta_indices["default"].tolist(), parameter.tolist(), strict=True))
    source = torch.arange(9)
    source[[0, 3, 8]] = -1
    dropped, grown = change(layer, source)
    layer(x)
    held = weight.clone()
    for places in (dropped, grown):
        assert torch.equal(held.view(-1)[places], before.view(-1)[places])
    # fact 13: kept entries keep their delta by position; fact 3: same parameter, same size
    now = dict(zip(layer.delta_indices["default"].tolist(), parameter.tolist(), strict=True))
    assert layer.delta_values["default"] is parameter and len(now) == 9
    assert all(now[place] == 0 for place in grown.tolist())
    common = set(now) & set(old)
    assert len(common) == 6 and all(now[place] == old[place] for place in common)
    layer.leave_resident()
    assert torch.equal(weight, before)


def test_fact29_every_way_out_leaves_the_base(trained, batch, base_weights, same, tmp_path) -> None:
    before = base_weights(trained)
    trained.add_adapter("other", trained.peft_config["default"])

    def effective() -> None:
        trained(**batch)
        assert not same(base_weights(trained), before)

    with sft.resident(trained):
        effective()
        with trained.disable_adapter():
            assert same(base_weights(trained), before)
            trained(**batch)
            assert same(base_weights(trained), before)
        effective()
        state = trained.state_dict()
        stored = {k.removeprefix("base_model.model."): v for k, v in state.items()}
        assert all(
            torch.equal(stored[k.replace(".weight", ".base_layer.weight")], v)
            if k.replace(".weight", ".base_layer.weight") in stored
            else torch.equal(stored[k], v)
            for k, v in before.items()
        )
        effective()
        trained.load_state_dict({k: v.clone() for k, v in trained.state_dict().items()})
        assert same(base_weights(trained), before)
        effective()
        trained.save_pretrained(tmp_path, save_embedding_layers=False)
        assert same(base_weights(trained), before)
        effective()
        trained.set_adapter("other")
        assert same(base_weights(trained), before)  # its deltas are zero
        trained.set_adapter("default")
        effective()
        trained.delete_adapter("other")
        effective()
    assert same(base_weights(trained), before)


def test_deleting_the_adapter_in_w_restores_the_base(trained, batch, base_weights, same) -> None:
    before = base_weights(trained)
    trained.add_adapter("other", trained.peft_config["default"])
    with sft.resident(trained):
        trained(**batch)
        with pytest.warns(UserWarning, match="Adapter default was active"):
            trained.delete_adapter("default")
        assert same(base_weights(trained), before)
        trained(**batch)
    assert same(base_weights(trained), before)


def test_exceptions_leave_the_base(trained, batch, base_weights, same) -> None:
    before = base_weights(trained)
    with pytest.raises(KeyError, match="stop"), sft.resident(trained):
        trained(**batch).loss.backward()
        raise KeyError("stop")
    assert same(base_weights(trained), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_while_resident_casts_the_pre_trained_weight(
    trained, batch, base_weights, same, llama, dtype
) -> None:
    expected = {name: weight.to(dtype) for name, weight in base_weights(trained).items()}
    with sft.resident(trained):
        trained(**batch)
        trained.to(dtype)
        assert same(base_weights(trained), expected)
        trained(**batch)
        assert not same(base_weights(trained), expected)
    assert same(base_weights(trained), expected)


def test_a_copy_made_while_resident_stands_alone(trained, batch, base_weights, same) -> None:
    before = base_weights(trained)
    with sft.resident(trained):
        logits = trained(**batch).logits
        held = base_weights(trained)
        twin = copy.deepcopy(trained)
        assert torch.equal(twin(**batch).logits, logits)
        with torch.no_grad():
            for layer in sparse_layers(twin).values():
                layer.delta_values["default"].add_(1.0)
        sync_resident(twin)
        assert not torch.equal(twin(**batch).logits, logits)
        assert same(base_weights(trained), held)
        leave_resident(twin)
        assert same(base_weights(twin), before)
        assert same(base_weights(trained), held)
    assert same(base_weights(trained), before)


@pytest.mark.parametrize("merge", [False, True])
def test_unloading_while_resident(trained, batch, base_weights, same, merge) -> None:
    before, twin = base_weights(trained), copy.deepcopy(trained).merge_and_unload()
    with sft.resident(trained):
        trained(**batch)
        plain = trained.merge_and_unload() if merge else trained.unload()
    assert same(base_weights(plain), base_weights(twin) if merge else before)


def test_policy_and_reference_in_one_graph(trained, batch) -> None:
    """What preference losses do: policy, then the base as reference, then backward."""
    trained.train()
    values = [p for p in trained.parameters() if p.requires_grad]
    with sft.resident(trained):
        expected = torch.autograd.grad(trained(**batch).loss, values)
        loss = trained(**batch).loss
        with torch.no_grad(), trained.disable_adapter():
            reference = trained(**batch).loss
        assert not torch.equal(loss, reference)
        found = torch.autograd.grad(loss - reference, values)
    for mine, dense in zip(found, expected, strict=True):
        assert torch.equal(mine, dense)


@pytest.mark.parametrize(
    "mode, event",
    [
        *[("resident", e) for e in ("step and sync", "step", "merge", "switch", "move", "write")],
        *[("aside", e) for e in ("step and sync", "step", "move")],
    ],
)
def test_backward_refuses_what_its_forward_did_not_see(trained, batch, mode, event) -> None:
    trained.add_adapter("other", trained.peft_config["default"])
    trained.train()
    if mode == "resident":
        enter_resident(trained)
    loss = trained(**batch).loss
    layers = sparse_layers(trained).values()
    for layer in layers:
        values = layer.delta_values["default"]
        if event.startswith("step"):
            with torch.no_grad():
                values.mul_(2.0)
        elif event == "merge":
            layer.merge()
        elif event == "switch":
            layer.set_adapter("other")
        elif event == "write":
            values.data = values.data * 2
            layer.sync()
        else:
            source = torch.arange(values.numel())
            source[0] = -1
            change(layer, source)
    if event == "step and sync":
        sync_resident(trained)
    with pytest.raises(RuntimeError, match=r"changed since this forward|modified by an inplace"):
        loss.backward()


def test_a_second_backward_of_the_same_forward(trained, batch) -> None:
    with sft.resident(trained.train()):
        loss = trained(**batch).loss
        loss.backward(retain_graph=True)
        trained.state_dict()
        trained(**batch)
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_fact35_recomputed_activations_change_no_gradient(make_layer, kind, reentrant) -> None:
    layer, x = make_layer(kind), inputs(kind).requires_grad_()
    with sft.resident(layer):
        expected = torch.autograd.grad(layer(x).square().sum(), layer.delta_values["default"])
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.delta_values["default"].grad, *expected)


@pytest.mark.parametrize("obstacle", ["hook", "int8", "own forward", "strided", "max_norm"])
def test_what_cannot_be_resident_runs_aside_and_says_so(make_layer, caplog, obstacle) -> None:
    layer = make_layer("embedding" if obstacle == "max_norm" else "linear")
    base = layer.get_base_layer()
    if obstacle == "hook":
        base.register_forward_hook(lambda module, args, out: None)
    elif obstacle == "int8":
        base.weight = torch.nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
    elif obstacle == "own forward":
        base.__class__ = type(
            "Own", (torch.nn.Linear,), {"forward": lambda self, x: F.linear(x, x)}
        )
    elif obstacle == "strided":
        base.weight.data = base.weight.data.t().contiguous().t()
    else:
        base.max_norm = 1.0
    before = base.weight.clone()
    with caplog.at_level(logging.WARNING, "sft.adapters.resident"), sft.resident(layer):
        assert layer.settle() is None
        assert "1 sparse layers run aside" in caplog.text
    assert torch.equal(base.weight, before)


def test_several_active_adapters_run_aside(trained, batch, base_weights, same, randomize) -> None:
    before = base_weights(trained)
    trained.add_adapter("other", trained.peft_config["default"])
    trained.base_model.set_adapter(["default", "other"])
    randomize(trained)
    bare = trained(**batch).logits
    aside = enter_resident(trained)
    assert set(aside.values()) == {"several adapters are active"}
    assert torch.equal(trained(**batch).logits, bare)
    assert same(base_weights(trained), before)
    leave_resident(trained)


def test_an_adapter_chosen_while_resident_sees_the_pre_trained_weight(spiel) -> None:
    fields = {"target_modules": ["q_proj"], "selection": "magnitude"}
    model = spiel(**(fields | {"selection": "random"}))
    for layer in sparse_layers(model).values():
        layer.delta_values["default"].data.fill_(9.0)
    with sft.resident(model):
        model.add_adapter("other", spiel(**fields).peft_config["default"])
    expected = sparse_layers(spiel(**fields))
    for name, layer in sparse_layers(model).items():
        chosen = expected[name].delta_indices["default"]
        assert torch.equal(layer.delta_indices["other"], chosen)


def test_a_forward_of_the_instance_is_not_bypassed(make_layer) -> None:
    layer = make_layer("linear")
    base = layer.get_base_layer()
    base.forward = lambda x: F.linear(x, base.weight, base.bias) + 1
    with sft.resident(layer):
        assert torch.equal(layer.get_base_layer().weight, base.weight)
        assert layer.settle() is None
