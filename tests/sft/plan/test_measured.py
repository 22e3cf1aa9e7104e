"""Planned bytes against those that torch's allocator gives out in a real step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sft.plan.batch import batch_of
from sft.plan.compare import METHODS, variant
from sft.plan.devices import Device
from sft.plan.placement import Placement
from sft.plan.plan import plan
from sft.run.trainable import build_method

DEVICE = Device("a CPU", 2**40, "cpu")
TRAINED_BACKWARD = [name for name in METHODS if "mezo" not in name]


@pytest.fixture(scope="module")
def bytes_of(plan_file) -> dict[str, list[int]]:
    """Planned and measured bytes by method."""
    script = Path(__file__).with_name("measured_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(plan_file)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TRAINED_BACKWARD)
def test_bytes_are_within_two_percent(name, bytes_of):
    planned, measured = bytes_of[name]
    assert planned == pytest.approx(measured, rel=0.02)


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
    from sft.recipe.load import load_recipe

    method = "method={name: sltrain, form: pretrain, r: 8, density: 0.02}"
    recipe = load_recipe(plan_file, [method, "model.config={}"])
    made = build_method(recipe)
    trained, _ = made.counts(made.attach(None, recipe.model))
    assert plan(recipe, batch_of(recipe), DEVICE, Placement()).trained == trained


def test_nothing_that_lasts_is_left_without_content(plan_recipe):
    from torch._subclasses.fake_tensor import FakeTensor

    from sft.kernels.bias_scales import bias_tables

    plan(plan_recipe, batch_of(plan_recipe), DEVICE, Placement())
    tables = bias_tables((0.9, 0.999), False, torch.device("cpu"))
    assert tables is not None
    assert not any(isinstance(table, FakeTensor) for table in tables)
