"""Drop and grow in a model, driven by hand: no trainer, no optimizer."""

from __future__ import annotations

import pytest
import torch

import sft
from sft.kernels.topk import top_k_reference

TARGETS = ["q_proj", "down_proj"]
FIELDS = {"target_modules": TARGETS, "reselect_every": 4, "window": 2}


def no_statistics(parameter):
    return None


def run(model, dynamics, steps, batches, *, first=0, scale=1.0):
    """Run updates of as many backward passes as there are batches; yield each update's changes.

    Gradients stay on the values: the means of a window are checked against them.
    """
    for step in range(first, first + steps):
        dynamics.before_update(step, len(batches))
        for batch in batches:
            (model(**batch).loss * scale / len(batches)).backward()
        dynamics.after_gradients(scale)
        yield dynamics.after_update(step + 1, no_statistics)


def listening(model) -> list[bool]:
    layers = model.base_model.adapted_layers("default").values()
    return [layer.site("default").tap is not None for layer in layers]


def halves(batch):
    return [
        {key: value[:, :5] for key, value in batch.items()},
        {key: value[:, 5:] for key, value in batch.items()},
    ]


def dense_gradients(llama, batches) -> dict[str, torch.Tensor]:
    model = llama()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters()}


def test_windows_listen_only_while_they_are_open(spiel, batch) -> None:
    model = spiel(**FIELDS).train()
    dynamics = model.base_model.dynamics("default", 12)
    heard = []
    for step in range(12):
        dynamics.before_update(step, 1)
        heard.append(all(listening(model)))
        model(**batch).loss.backward()
        dynamics.after_gradients(1.0)
        changes = dynamics.after_update(step + 1, no_statistics)
        assert bool(changes) == (step + 1 in (2, 6, 10))
        model.zero_grad()
    assert heard == [t in (1, 2, 5, 6, 9, 10) for t in range(1, 13)]
    assert not any(listening(model))


@pytest.mark.parametrize("mode", ["resident", "aside"])
@pytest.mark.parametrize("pool", ["micro_batch", "update"])
def test_fact15_fact17_fact26_the_first_reselection(llama, spiel, batch, pool, mode) -> None:
    model = spiel(**FIELDS, candidates_from=pool).train()
    batches, layers = halves(batch), model.base_model.adapted_layers("default")
    old = {name: layer.delta_indices["default"].long() for name, layer in layers.items()}
    dynamics = model.base_model.dynamics("default", 100)
    if mode == "resident":
        from sft.adapters.resident import enter_resident

        enter_resident(model)
    *_, changes = run(model, dynamics, 2, batches, scale=8.0)
    whole = dense_gradients(llama, batches)
    pool_of = whole if pool == "update" else dense_gradients(llama, batches[:1])
    assert [change.name for change in changes] == list(layers)
    for change in changes:
        layer = layers[change.name]
        scores = pool_of[change.name].flatten().abs()
        scores[old[change.name]] = -1
        now = layer.delta_indices["default"].long()
        assert torch.equal(now, top_k_reference(scores, len(now)))  # fact 26
        assert (change.source == -1).all() and change.updates == 2
        # the same gradient in both updates: its mean is itself, for any split (fact 17)
        g = whole[change.name].flatten()[now]
        torch.testing.assert_close(change.mean_grad, g, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(change.mean_square, g.square(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("reference", [False, True])
def test_fact03_fact10_fact13_later_reselections(spiel, batch, randomize, reference) -> None:
    model = spiel(**FIELDS, reference=reference, replace_fraction=0.5).train()
    layers = model.base_model.adapted_layers("default")
    parameters = {name: layer.delta_values["default"] for name, layer in layers.items()}
    dynamics = model.base_model.dynamics("default", 12)
    changed = {}
    for step in range(12):
        if step > 1:
            randomize(model, seed=step)
        before = {
            name: (layer.delta_indices["default"].clone(), layer.delta_values["default"].clone())
            for name, layer in layers.items()
        }
        (changes,) = run(model, dynamics, 1, [batch], first=step)
        for change in changes:
            indices, values = before[change.name]
            layer, source = layers[change.name], change.source
            k, share = len(values), 1.0 if step == 1 else 0.5 * (12 - step - 1) / 12
            dropped = set(values.abs().argsort(stable=True)[: int(k * share)].tolist())
            kept = source[source >= 0].tolist()
            gone = set(range(k)) - set(kept)
            assert gone <= dropped
            if not reference:
                assert gone == dropped  # candidates leave out active positions: nothing cancels
            now = layer.delta_indices["default"]
            assert layer.delta_values["default"] is parameters[change.name]
            assert torch.equal(now[source >= 0], indices[kept])
            assert torch.equal(layer.delta_values["default"][source >= 0], values[kept])
            assert not layer.delta_values["default"][source < 0].any()
            assert (now[1:] > now[:-1]).all()
            changed[step + 1] = True
    assert sorted(changed) == [2, 6, 10]


@pytest.mark.parametrize("cut", [1, 2, 5, 6])
def test_fact32_state_continues_inside_a_window(spiel, batch, randomize, cut) -> None:
    def train(cut: int | None):
        model = spiel(**FIELDS).train()
        dynamics = model.base_model.dynamics("default", 12)
        for step in range(8):
            if step == cut:
                state = {name: tensor.clone() for name, tensor in dynamics.state().items()}
                dynamics.close()
                dynamics = model.base_model.dynamics("default", 12)
                dynamics.load_state(state)
            randomize(model, seed=step)
            list(run(model, dynamics, 1, halves(batch), first=step))
        layers = model.base_model.adapted_layers("default").values()
        return [layer.delta_indices["default"] for layer in layers]

    for mine, straight in zip(train(cut), train(None), strict=True):
        assert torch.equal(mine, straight)


def test_void_updates_are_left_out_of_the_mean(spiel, batch) -> None:
    model = spiel(**FIELDS).train()
    dynamics = model.base_model.dynamics("default", 12)
    dynamics.before_update(0, 1)
    model(**batch).loss.backward()
    dynamics.after_gradients(0.0)
    assert dynamics.after_update(1, no_statistics) == []
    (changes,) = run(model, dynamics, 1, [batch], first=1)
    assert {change.updates for change in changes} == {1}


def test_a_window_of_void_updates_changes_nothing(spiel, batch) -> None:
    model = spiel(**FIELDS).train()
    dynamics = model.base_model.dynamics("default", 12)
    for step in range(2):
        dynamics.before_update(step, 1)
        model(**batch).loss.backward()
        dynamics.after_gradients(0.0)
        assert dynamics.after_update(step + 1, no_statistics) == []
    assert not any(listening(model))


def test_a_full_support_has_nowhere_to_move(spiel, batch) -> None:
    model = spiel(**FIELDS, density=1.0).train()
    dynamics = model.base_model.dynamics("default", 12)
    *_, changes = run(model, dynamics, 2, [batch])
    for change in changes:
        assert torch.equal(change.source, torch.arange(len(change.source)))


def test_a_static_support_has_no_dynamics(spiel) -> None:
    assert spiel(growth="none").base_model.dynamics("default", 12) is None


@pytest.mark.parametrize("resident", [False, True])
def test_fact12_fact19_growth_by_momentum(spiel, batch, randomize, resident) -> None:
    model = spiel(**FIELDS, growth="momentum", replace_fraction=0.3, first_full=False).train()
    layers = model.base_model.adapted_layers("default")
    dynamics = model.base_model.dynamics("default", 10)
    randomize(model)
    torch.manual_seed(4)
    statistics = {
        id(layer.delta_values["default"]): (torch.rand(layer.shape[0]), torch.rand(layer.shape[1]))
        for layer in layers.values()
    }
    before = {name: layer.delta_indices["default"].clone() for name, layer in layers.items()}
    if resident:
        from sft.adapters.resident import enter_resident

        enter_resident(model)
    model(**batch)
    assert dynamics.after_update(1, no_statistics) == []
    changes = dynamics.after_update(2, lambda p: statistics[id(p)])
    assert len(changes) == len(layers)
    for change in changes:
        layer, k = layers[change.name], len(change.source)
        grown = layer.delta_indices["default"][change.source < 0].long()
        assert len(grown) == int(k * 0.3 * 8 / 10)
        product = torch.outer(*statistics[id(layer.delta_values["default"])]).flatten().double()
        product[before[change.name].long()] = -1
        assert torch.equal(grown, top_k_reference(product, len(grown)))
        assert change.updates == 0 and change.mean_grad is None
    # an optimizer that has no statistics for a parameter yet moves nothing
    assert dynamics.after_update(6, no_statistics) == []


def test_growing_changes_no_output(spiel, batch) -> None:
    """All deltas are zero, so whatever is dropped or grown the model is the base."""
    model = spiel(**FIELDS).train()
    expected = model(**batch).logits
    with sft.resident(model):
        dynamics = model.base_model.dynamics("default", 12)
        *_, changes = run(model, dynamics, 2, [batch])
        assert changes and torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("selection", ["random", "magnitude", "gradient", "fisher"])
def test_only_a_random_start_is_a_placeholder(selection) -> None:
    assert sft.SpielConfig(selection=selection).first_full == (selection == "random")
    assert sft.SpielConfig(selection=selection, first_full=True).first_full
    assert not sft.SpielConfig(selection=selection, first_full=False).first_full


@pytest.mark.parametrize(
    "field, value",
    [
        ("window", 2.5),
        ("reselect_every", 7.5),
        ("num_weights", 10.5),
        ("num_weights", True),
        ("density", "0.1"),
        ("calibration_batches", 1.5),
    ],
)
def test_a_value_of_the_wrong_type_is_named(field, value) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: got {value!r}, allowed is"):
        sft.SpielConfig(**{field: value})


@pytest.mark.parametrize("optimizer", ["adamw", "trainer"])
def test_growth_by_momentum_wants_sm3(optimizer) -> None:
    with pytest.raises(ValueError, match=r"^optimizer: got"):
        sft.SpielConfig(growth="momentum", optimizer=optimizer)
