"""The same update, however it is split or recomputed."""

from __future__ import annotations

import pytest
import torch


def assert_same_run(lab, a, b, tolerance):
    a, b = lab.deltas(a.model), lab.deltas(b.model)
    for name, found in a.items():
        if "values" in name:
            torch.testing.assert_close(found, b[name], rtol=0, atol=tolerance)
        else:
            assert torch.equal(found, b[name]), name


def test_four_of_one_are_one_of_four(lab):
    """Fact 35; sgd, as Adam's sign-like first steps blow rounding up."""
    settings = {"candidates_from": "update", "optimizer": "trainer", "optim": "sgd"}
    settings["learning_rate"] = 0.1
    split = lab.run(per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    whole = lab.run(per_device_train_batch_size=4, **settings)
    assert len(whole.replaced) == 3
    assert split.replaced == whole.replaced
    assert_same_run(lab, split, whole, 1e-5)


def test_four_of_one_are_one_of_four_with_ages(lab):
    settings = {"candidates_from": "update", "adam_epsilon": 1e-4}
    split = lab.run(per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    whole = lab.run(per_device_train_batch_size=4, **settings)
    assert_same_run(lab, split, whole, 1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_gradient_checkpointing_changes_nothing(lab, reentrant, growth):
    plain = lab.run(growth=growth)
    again = lab.run(
        growth=growth,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert all(t.any() for n, t in lab.deltas(again.model).items() if "values" in n)
    assert_same_run(lab, plain, again, 1e-5)


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_recomputed_inputs_are_kept_with_the_same_noise(lab, form):
    plain, exact = lab.run(saved_inputs=form), lab.run()
    again = lab.run(
        saved_inputs=form,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    assert_same_run(lab, plain, again, 0)
    assert plain.losses[0] == exact.losses[0]
    assert plain.losses[1:] != exact.losses[1:]


def test_reentrant_checkpointing_draws_anew_each_step(lab, monkeypatch):
    """It recomputes from the generator's state, which nothing else moves within an epoch."""
    from sft.kernels import kept

    keys, draw = [], kept.draw
    monkeypatch.setattr(kept, "draw", lambda key, n: keys.append(key) or draw(key, n))
    lab.run(
        saved_inputs="int8",
        max_steps=3,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    # q, k and v read one input, gate and up another; what o reads attention keeps anyway
    assert len(keys) == 3 * 2 * 3
    assert len(set(keys)) == len(keys)


def test_gradient_checkpointing_trains_by_default(lab):
    run = lab.run(activation_checkpointing=True, max_steps=2)
    moved = [t.abs().max() for n, t in lab.deltas(run.model).items() if "values" in n]
    assert max(moved) > 0
