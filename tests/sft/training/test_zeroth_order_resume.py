"""A run by forward passes that is killed and resumed ends as one that was not (Z9)."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from sft import SparseTrainer, ZerothOrderConfig
from sft.checkpoint import MARK
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.zeroth_order.log import LOG

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


class Stop(TrainerCallback):
    """Ends the training by an error after some updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def build(llama, tmp_path):
    """Build a trainer over a tiny model; runs into `tmp_path / name`."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    rows = torch.randint(0, 48, (24, 6), generator=torch.Generator().manual_seed(0)).tolist()

    def make(name, *, adapted=False, config=None, **settings):
        model = llama()
        if adapted:
            torch.manual_seed(settings.pop("start", 5))
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        args = TrainingArguments(
            output_dir=str(tmp_path / name),
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "save_steps": 2,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                **settings,
            },
        )
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        return SparseTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=data,
            zeroth_order=config or ZerothOrderConfig(),
        )

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def equal(a, b) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"config": ZerothOrderConfig(sparsity=0.6, queries=2)},
        {"adapted": True, "config": ZerothOrderConfig(update="adam", dense_state=True)},
    ],
    ids=["full", "masked", "lora with adam"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(build, tmp_path, case) -> None:
    whole = build("whole", **case)
    whole.train()
    cut = build("cut", **case)
    cut.add_callback(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    (tmp_path / "cut/checkpoint-4" / MARK).unlink()  # as if it had been cut short
    resumed = build("cut", **case, **({"start": 6} if "adapted" in case else {}))
    steps = []
    resumed.add_callback(type("Watch", (TrainerCallback,), {
        "on_step_begin": lambda self, args, state, control, **_: steps.append(state.global_step)
    })())  # fmt: skip
    resumed.train(resume_from_checkpoint=True)
    assert steps == [2, 3, 4, 5]
    assert equal(weights(whole), weights(resumed))
    logs = [(tmp_path / name / "zeroth_order" / LOG).read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(build, tmp_path) -> None:
    build("run").train()
    for step in (2, 4, 6):
        (tmp_path / f"run/checkpoint-{step}" / MARK).unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        build("run").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="so it was cut short"):
        build("run").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))


def test_the_start_follows_a_run_into_another_folder(build, tmp_path, caplog) -> None:
    build("run", adapted=True).train()
    start = tmp_path / "run/zeroth_order/start/adapter_model.safetensors"
    build("other", adapted=True).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    there = tmp_path / "other/zeroth_order/start/adapter_model.safetensors"
    assert there.read_bytes() == start.read_bytes()
    assert "the adapter that the run started from" not in caplog.text
    shutil.rmtree(tmp_path / "run/zeroth_order")
    build("third", adapted=True).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert "the adapter that the run started from is not in" in caplog.text


def test_the_log_is_written_while_the_run_goes_on(build, tmp_path) -> None:
    trainer = build("run", save_strategy="no")
    trainer.add_callback(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    log = ZerothOrderLog.load(tmp_path / "run/zeroth_order" / LOG)
    assert len(log) == 4
    assert log.header["end_sha"] is None
    assert len(log.header["start_sha"]) == 64
    assert log.header["model_dtype"] == "float32"


def test_the_best_checkpoint_is_not_taken_for_the_end(build, tmp_path) -> None:
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build("run", **settings)
    trainer.train()
    log = ZerothOrderLog.load(tmp_path / "run/zeroth_order" / LOG)
    assert len(log) == 6
    assert log.header["end_sha"] is None


KILLED = """
import os, signal, sys
from sft.zeroth_order.log import ZerothOrderLogCallback
def kill(self, args, state, control, **_):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
ZerothOrderLogCallback.on_step_end = kill
sys.argv = ["sft", "train", *sys.argv[1:], "--plain"]
from sft.cli import main
main()
"""


SETTINGS = (
    "method={name: lora, r: 2, target_modules: [q_proj, v_proj]}",
    "zeroth_order={queries: 2}",
    "training.max_steps=6",
    "training.save_strategy=steps",
    "training.save_steps=2",
)


def test_a_killed_command_goes_on_in_another_process(tmp_path, recipe_file) -> None:
    from sft.recipe.load import load_recipe
    from sft.run.job import train_from_recipe

    def train(folder: Path, *settings: str):
        given = [*SETTINGS, f"training.output_dir={folder}", *settings]
        recipe = load_recipe(recipe_file, given)
        return train_from_recipe(recipe, Console(file=io.StringIO()))

    whole = train(tmp_path / "whole")
    folder = tmp_path / "cut"
    command = [sys.executable, "-c", KILLED, str(recipe_file), *SETTINGS]
    command.append(f"training.output_dir={folder}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    resumed = train(folder, "training.resume_from_checkpoint=auto")
    assert resumed.steps == whole.steps == 6
    for part in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = load_file(whole.output_dir / part), load_file(folder / part)
        assert equal(a, b), part
    logs = [(run / "zeroth_order" / LOG).read_bytes() for run in (whole.output_dir, folder)]
    assert logs[0] == logs[1]
