"""Plan and measure a step of every method; print both as JSON.

A process of its own, as whole runs are: what other tests leave in one moves bytes.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from dataclasses import replace

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
from sft.recipe.load import load_recipe
from sft.run.trainable import build_method

DEVICE = Device("a CPU", 2**40, "cpu")
SHORT = 8  # tokens that the first row lacks


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
    gc.collect()  # what an earlier method left must not be given back while this one is noted
    config = AutoConfig.from_pretrained(recipe.model.name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        model = build_method(recipe).attach(model, recipe.model)
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


def main(recipe_file: str) -> None:
    recipe, found = load_recipe(recipe_file), {}
    for name in METHODS:
        if "mezo" in name:
            continue
        chosen = variant(recipe, name)
        batch = batch_of(chosen)
        batch = replace(batch, labels=batch.labels - SHORT)
        planned = plan(chosen, batch, DEVICE, Placement()).peak
        # a run begins with a copy: the method fills its configuration in
        found[name] = planned, measured(copy.deepcopy(chosen), batch)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
