"""Plan a training step of every method, run it, and compare the bytes.

    python benchmarks/plan.py [--only CASE ...] [--out FILE]

The quickstart's model and data, its eight longest words in each batch. Each case runs in a process
of its own, as `sft train` would run it, for four updates. Measured is the most that torch's
allocator had given out at once in the last two updates: what tensors held at their beginning, found
by looking at all of them, and what the profiler saw come and go.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from profiled import _silent as silent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import TrainerCallback

from sft.data.load import load_data
from sft.models import load_model, load_tokenizer
from sft.plan.batch import batch_of, longest_rows
from sft.plan.compare import METHODS, OWN, variant
from sft.plan.devices import Device
from sft.plan.placement import Placement
from sft.plan.plan import plan
from sft.quiet import quiet_libraries
from sft.recipe.load import load_recipe
from sft.recipe.schema import Recipe
from sft.run.build import attached, build_trainer
from sft.run.trainable import build_method
from sft.tasks.find import build_task

UPDATES = 4
# name -> settings over the recipe, of cases that are no method of their own
MORE = {
    "spiel, reselecting": [
        "method.reselect_every=1",
        "method.window=1",
        "method.stop_fraction=1",
    ],
    "spiel, inputs kept in int8": ["method.saved_inputs=int8"],
    "spiel, activation checkpointing": ["training.gradient_checkpointing=true"],
}
CASES = (OWN, *METHODS, *MORE, "sltrain from scratch")


def recipe_of(case: str, output: str) -> Recipe:
    """Return the recipe of a case."""
    settings = [f"training.output_dir={output}", f"training.max_steps={UPDATES}"]
    if case == "sltrain from scratch":
        return load_recipe("sltrain_pretrain", settings)
    recipe = load_recipe("quickstart", [*settings, *MORE.get(case, [])])
    return variant(recipe, case) if case in METHODS else recipe


def planned(case: str) -> dict[str, Any]:
    """Plan a case."""
    recipe = recipe_of(case, "runs/none")
    found = plan(recipe, batch_of(recipe), Device("a CPU", 2**40, "cpu"), Placement())
    return {"planned": found.peak, "parts": found.device_bytes, "kept": found.activations}


def measured(case: str, folder: str) -> dict[str, Any]:
    """Run a case and return the bytes at its peak."""
    quiet_libraries()
    recipe = recipe_of(case, folder)
    method = build_method(recipe)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe.data, recipe.seed)
    rows = recipe.training["per_device_train_batch_size"]
    chosen = longest_rows(data, tokenizer, rows, 1024)
    data = replace(data, train=data.train.select([place for place, _ in chosen]))
    # out of the mapped file, whose pages no allocator knows
    model = None if method.from_scratch else copy.deepcopy(load_model(recipe.model))
    task = build_task(recipe.task)
    model = attached(recipe, task, method, model)
    trainer = build_trainer(recipe, task, model, tokenizer, data, [])
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return {"measured": max(watch.peaks[2:]), "held": watch.held[-1]}


def _measured_apart(case: str) -> dict[str, Any]:
    own = [sys.executable, "-W", "ignore", __file__, "--measure", case]
    lines = subprocess.run(own, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class Watch(TrainerCallback):  # type: ignore[misc]
    """Adds up what the allocator gives out in each update."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.peaks: list[int] = []
        self._profile: Any = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """End with the update before, and begin anew."""
        self._finish()
        gc.collect()
        self.held.append(held_bytes())
        with silent():
            self._profile = torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End with the last update."""
        self._finish()

    def _finish(self) -> None:
        if self._profile is None:
            return
        with silent():
            self._profile.__exit__(None, None, None)
        live = peak = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        self.peaks.append(self.held[-1] + peak)
        self._profile = None


def held_bytes() -> int:
    """Return the bytes of all tensors that there are, each storage once."""
    found = {}
    for thing in gc.get_objects():
        # by type: to ask an object for its class may run its code
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            if storage.device.type == "cpu":
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/plan.json"
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--plan-alone", action="store_true", help="keep what was measured")
    args = parser.parse_args()
    if args.measure:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measured(args.measure, f"{scratch}/run")))
        return
    quiet_libraries()
    recipe = load_recipe("quickstart")
    batch = batch_of(recipe)
    result = {"machine": machine(), "batch": [batch.rows, batch.length], "cases": {}}
    if args.out.exists() and (args.plan_alone or set(args.only) != set(CASES)):
        result["cases"] = json.loads(args.out.read_text())["cases"]
    for case in args.only:
        if args.plan_alone:
            found = result["cases"][case] | planned(case)
        else:
            found = planned(case) | _measured_apart(case)
        found["error"] = found["planned"] / found["measured"] - 1
        result["cases"][case] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{case:32} {found['planned']:13,} {found['measured']:13,} {found['error']:+.2%}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
