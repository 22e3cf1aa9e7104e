"""Planned bytes against those that torch's allocator gives out in a real step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sft.adapters.resident import enter_resident, leave_resident, sync_resident
from sft.chunked_loss import chunked_nll
from sft.optim.adamw import SparseAdamW
from sft.plan.batch import Batch, batch_of
from sft.plan.compare import METHODS, variant
from sft.plan.devices import Device
from sft.plan.placement import Placement
from sft.plan.plan import plan
from sft.trainable import build_method

DEVICE = Device("a CPU", 2**40, "cpu")
SHORT = 8  # tokens that the first row lacks
TRAINED_BACKWARD = [name for name in METHODS if "mezo" not in name]


def run_step(model, optimizer, batch: Batch) -> None:
    ids = torch.randint(3, 2000, (batch.rows, batch.length))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, -SHORT:], labels[0, -SHORT:] = 0, -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert int((labels[:, 1:] != -100).sum()) == batch.labels
    chunked_nll(model, inputs)[0].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sync_resident(model)


def measured(recipe, batch: Batch) -> int:
    """Return the most bytes given out at once in a third step, those before it included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(recipe.model.name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        model = build_method(recipe.method).attach(model, recipe.model)
        enter_resident(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        ours = recipe.method["name"] == "spiel"
        optimizer = SparseAdamW(trained) if ours else torch.optim.AdamW(trained, fused=True)
        for _ in range(2):
            run_step(model, optimizer, batch)
        with record_function("measured"):
            run_step(model, optimizer, batch)
        leave_resident(model)
    events = found.profiler.kineto_results.events()
    (own,) = [event for event in events if event.name() == "measured"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            inside = own.start_ns() <= event.start_ns() <= own.end_ns()
            peak = max(peak, live) if inside else peak
    return peak


@pytest.mark.parametrize("name", TRAINED_BACKWARD)
def test_bytes_are_within_two_percent(name, plan_recipe):
    recipe = variant(plan_recipe, name)
    batch = batch_of(recipe)
    batch = replace(batch, labels=batch.labels - SHORT)
    found = plan(recipe, batch, DEVICE, Placement())
    # a run begins with a copy: the method fills its configuration in
    real = measured(copy.deepcopy(recipe), batch)
    assert found.peak == pytest.approx(real, rel=0.02)


def test_a_deep_model_is_planned_by_shallow_ones(plan_recipe, monkeypatch):
    recipe = variant(plan_recipe, "full")
    batch = batch_of(recipe)
    shallow = plan(recipe, batch, DEVICE, Placement())
    monkeypatch.setattr("sft.plan.plan.equal_stack", lambda *_: None)
    whole = plan(recipe, batch, DEVICE, Placement())
    assert shallow.peak == pytest.approx(whole.peak, rel=1e-3)
    assert shallow.activations == pytest.approx(whole.activations, rel=1e-3)
    assert shallow.trained == whole.trained


def test_from_scratch_a_tied_head_is_counted_once(plan_file):
    from sft.recipe import load_recipe

    method = "method={name: sltrain, form: pretrain, r: 8, density: 0.02}"
    recipe = load_recipe(plan_file, [method, "model.config={}"])
    made = build_method(recipe.method)
    trained, _ = made.counts(made.attach(None, recipe.model))
    assert plan(recipe, batch_of(recipe), DEVICE, Placement()).trained == trained


def test_nothing_that_lasts_is_left_without_content(plan_recipe):
    from torch._subclasses.fake_tensor import FakeTensor

    from sft.kernels.bias_scales import bias_tables

    plan(plan_recipe, batch_of(plan_recipe), DEVICE, Placement())
    tables = bias_tables((0.9, 0.999), False, torch.device("cpu"))
    assert tables is not None
    assert not any(isinstance(table, FakeTensor) for table in tables)
