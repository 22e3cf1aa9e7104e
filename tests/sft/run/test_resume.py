"""`sft train`, stopped after a checkpoint and run again, ends in the weights of a whole run."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sft.recipe.load import load_recipe
from sft.report.log import RunLog
from sft.run.job import train_from_recipe

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
PAIRS = [(a, b) for a in WORDS for b in WORDS]
ROWS = {
    "sft": [{"prompt": f"{a} ->", "completion": f" {b}"} for a, b in PAIRS],
    "dpo": [{"prompt": f"{a} ->", "chosen": f" {b}", "rejected": " seven six"} for a, b in PAIRS],
}
STREAMED = ["data.streaming=true", "data.shuffle_buffer=16"]
RUNS = {
    "streamed": ("sft", STREAMED),
    "streamed-again": ("sft", [*STREAMED, "data.train_examples=10"]),  # an epoch ends in between
    "dpo": ("dpo", ["training.max_length=16"]),
    "dpo-by-forward-passes": (
        "dpo", ["training.max_length=16", "method.growth=none", "zeroth_order={}"],
    ),
}  # fmt: skip
STOP = 5  # the last checkpoint is of update 4


class Stopped(RunLog):
    """Ends a run as Ctrl-C does."""

    def on_step_end(self, args, state, control, **given):
        if state.global_step == STOP:
            self.on_train_end(args, state, control)  # closes the file
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, tiny_model, monkeypatch, name):
    task, settings = RUNS[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
model: {{name: {tiny_model}}}
task: {task}
method: {{name: spiel, density: 0.1, reselect_every: 2, window: 1}}
data: {{train: {rows}, eval_examples: 4}}
evaluation: {{metrics: [], samples: 0}}
forgetting: false
export: {{merged: false}}
training:
  max_steps: 7
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  logging_steps: 1
  save_strategy: steps
  save_steps: 2
  use_cpu: true
"""
    )

    def train(folder, *more):
        given = [*settings, f"training.output_dir={tmp_path / folder}", *more]
        train_from_recipe(load_recipe(path, given), Console(file=io.StringIO()))

    train("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sft.run.job.RunLog", Stopped)
        train("parts")
    assert not (tmp_path / "parts/adapter").exists()
    train("parts", "training.resume_from_checkpoint=auto")
    one, other = (
        (tmp_path / folder / "adapter/adapter_model.safetensors").read_bytes()
        for folder in ("whole", "parts")
    )
    assert one == other
    assert losses(tmp_path / "whole")[-3:] == losses(tmp_path / "parts")[-3:]


def losses(folder):
    """Return the losses of a run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
