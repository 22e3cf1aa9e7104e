"""Optimizer state in 8 bits, of tensors as small as the trained values of a layer."""

from __future__ import annotations

import pytest
import torch

from sft import SpielConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CONFIG = SpielConfig(
    density=0.2, reselect_every=3, window=1, first_full=False, optimizer="trainer",
    task_type="CAUSAL_LM",
)  # fmt: skip
NF4 = {"bits": "nf4"}


def states(trainer):
    inner = trainer.optimizer.optimizer
    return {
        state["state1"].dtype for group in inner.param_groups
        for state in (inner.state[p] for p in group["params"])
    }  # fmt: skip


def test_the_bound_decides_and_positions_still_move(lab):
    settings = {"optim": "adamw_bnb_8bit", "optim_args": "min_8bit_size=256"}
    model = lab.adapt(lab.packed(NF4), CONFIG)
    before = {n: b.clone() for n, b in model.named_buffers() if "delta_indices" in n}
    trainer = lab.train(model, **settings, max_steps=8)
    assert states(trainer) == {torch.uint8}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert trainer.sparse_callback.replaced
    after = dict(model.named_buffers())
    assert any(not torch.equal(indices, after[name]) for name, indices in before.items())


def test_without_it_small_tensors_keep_32_bits(lab):
    model = lab.adapt(lab.packed(NF4), CONFIG)
    assert states(lab.train(model, optim="adamw_bnb_8bit", max_steps=1)) == {torch.float32}


def test_a_resumed_run_keeps_its_codes(lab):
    settings = {"optim": "adamw_bnb_8bit", "optim_args": "min_8bit_size=256"}
    whole = lab.adapt(lab.packed(NF4), CONFIG)
    lab.train(whole, save_strategy="steps", save_steps=4, out="whole", **settings)
    again = lab.adapt(lab.packed(NF4), CONFIG)
    lab.train(again, resume=str(lab.out / "whole" / "checkpoint-4"), out="again", **settings)
    expected = lab.state(whole)
    for name, tensor in lab.state(again).items():
        assert torch.equal(tensor, expected[name]), name


REFUSED = {
    "another-optimizer": ({"optim": "sgd", "optim_args": "min_8bit_size=8"}, "SGD does not take"),
    "no-number": ({"optim": "adamw_bnb_8bit", "optim_args": "min_8bit_size=few"}, "got min_8bit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bound_that_cannot_be_kept_is_refused(lab, name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        lab.train(lab.adapt(lab.packed(NF4), CONFIG), max_steps=1, **settings)
