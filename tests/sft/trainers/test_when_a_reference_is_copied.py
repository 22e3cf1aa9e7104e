"""A reference is dropped where the adapter adds nothing at all, and only TRL's own copy is set."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from sft.identity import sparse_tuner
from sft.reference import ReferenceMixin, adds_nothing


@pytest.fixture
def adapted(llama, method_config):
    return get_peft_model(llama(), method_config("spiel", seed=0))


def test_one_trained_layer_is_enough_to_be_kept(adapted):
    tuner = sparse_tuner(adapted)
    assert adds_nothing(tuner, "default")
    last = [p for n, p in adapted.named_parameters() if p.requires_grad and "default" in n][-1]
    with torch.no_grad():
        last.view(-1)[0] += 1.0
    assert not adds_nothing(tuner, "default")


def test_modules_that_are_trained_densely_are_kept(adapted):
    tuner = sparse_tuner(adapted)
    tuner.peft_config["default"].modules_to_save = ["lm_head"]
    assert not adds_nothing(tuner, "default")


@pytest.mark.parametrize("given", [("default", "ref"), ("default",), ()], ids=len)
def test_a_users_own_reference_is_left_alone(monkeypatch, given):
    settled = []
    monkeypatch.setattr("sft.reference.settle_reference", settled.append)
    mixin = ReferenceMixin()
    mixin.model = type("Model", (), {"peft_config": dict.fromkeys(given)})()
    mixin._expect_reference(mixin.model)
    mixin._settle_reference()
    assert bool(settled) == (given == ("default",))
