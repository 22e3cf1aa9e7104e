"""`sft train` on several processes: one speaks, a killed one ends all, a checkpoint goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from sft.checkpoint import last_whole_checkpoint
from sft.errors import UserError
from sft.processes import Team, check_in_touch, count, rank, say

RECIPE = """\
model: {{name: {model}}}
method: {{name: spiel, density: 0.05, reselect_every: 10, window: 2}}
data: {{train: {rows}, eval_examples: 9}}
evaluation: {{metrics: [nll]}}
training:
  output_dir: {output}
  max_steps: 40
  per_device_train_batch_size: {batch}
  learning_rate: 1e-3
  logging_steps: 10
  save_strategy: steps
  save_steps: 2
"""
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer on disk, with rows to train it on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocab = {word: i for i, word in enumerate(["<pad>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    lines = [{"prompt": f"{a} {b}", "completion": f" {a} {b}"} for a in WORDS for b in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def recipe(model, tmp_path) -> Any:
    """Write a recipe for a batch of 4, however many processes share it."""

    def write(name: str, processes: int = 1) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            RECIPE.format(
                model=model,
                rows=model / "rows.jsonl",
                output=tmp_path / name,
                batch=4 // processes,
            )
        )
        return path

    return write


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sft", "train", str(path), "--plain", "--processes", "2", *more]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


def in_one_process(path: Path, *overrides: str) -> Any:
    from rich.console import Console

    from sft.recipe.load import load_recipe
    from sft.run.job import train_from_recipe

    return train_from_recipe(load_recipe(path, overrides), Console(quiet=True))


def children(process: int) -> list[int]:
    """Return the processes that this one started and that train."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(pid) for pid in found if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_a_killed_process_ends_the_others_and_its_checkpoint_goes_on(recipe, tmp_path) -> None:
    path, output = recipe("run", processes=2), tmp_path / "run"
    with subprocess.Popen(
        command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        wait_for(lambda: (output / "checkpoint-4" / "sft_state.json").is_file(), 120)
        both = children(launcher.pid)
        assert len(both) == 2
        os.kill(both[1], signal.SIGKILL)
        killed = time.monotonic()
        shown, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert launcher.returncode == 2
    assert errors.splitlines()[-1] == (
        "sft: process 1 was ended by SIGKILL, the others were stopped; resume the last checkpoint "
        "with training.resume_from_checkpoint=auto"
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
    assert shown.count("examples to train on") == 1
    last = last_whole_checkpoint(output)
    assert last is not None and int(last.name.split("-")[1]) < 40

    going_on = ("training.resume_from_checkpoint=auto", "training.per_device_train_batch_size=4")
    found = in_one_process(path, *going_on)
    whole = in_one_process(recipe("whole"), "training.save_strategy=no")
    assert found.steps == whole.steps == 40
    assert found.after["nll"] == pytest.approx(whole.after["nll"], abs=1e-5)
    one, other = trained(output), trained(tmp_path / "whole")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.engines
def test_two_processes_print_write_and_end_once(recipe, tmp_path) -> None:
    path, output = recipe("two", processes=2), tmp_path / "two"
    done = subprocess.run(command(path), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    phases = [line for line in lines if line != "step" and line.isalpha()]
    assert phases == ["data", "model", "method", "before", "train", "save", "after", "export"]
    found, whole = json.loads((output / "run.json").read_text()), in_one_process(recipe("whole"))
    assert found["after"]["nll"] == pytest.approx(whole.after["nll"], abs=1e-5)
    assert found["steps"] == whole.steps
    assert found["max_logit_difference"] == whole.max_logit_difference


@pytest.mark.engines
def test_what_all_processes_refuse_is_said_once(recipe) -> None:
    done = subprocess.run(
        command(recipe("no"), "method.density=7"),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sft: override 'method.density=7': method.density")


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the second of two processes that torchrun started."""
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)


def test_a_process_knows_who_it_is(second, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (rank(), count()) == (1, 2)
    monkeypatch.delenv("LOCAL_RANK")  # a cluster sets WORLD_SIZE for purposes of its own
    assert (rank(), count()) == (0, 1)


def test_another_process_lets_the_first_one_speak(second, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sft.processes.PATIENCE", 0.05)
    began = time.monotonic()
    say(UserError("data.train: no such file"))
    assert time.monotonic() - began >= 0.05
    assert capsys.readouterr().err == "sft: process 1: data.train: no such file\n"
    monkeypatch.setenv("RANK", "0")
    say(UserError("data.train: no such file"))
    assert capsys.readouterr().err == "sft: data.train: no such file\n"


def test_a_team_leaves_together_and_once(second, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class State:
        def __init__(self, cpu: bool) -> None:
            done.append("met")

        def wait_for_everyone(self) -> None:
            done.append("waited")

        def destroy_process_group(self) -> None:
            done.append("left")

    monkeypatch.setattr("accelerate.PartialState", State)
    team = Team(cpu=True)
    assert not team.first
    team.leave()
    team.leave()
    team.wait()
    assert done == ["met", "waited", "left"]


def test_processes_that_do_not_find_one_another_are_refused(second) -> None:
    with pytest.raises(
        ValueError, match=r"^use_cpu: got False in one of 2 processes .*use_cpu=True"
    ):
        check_in_touch(SimpleNamespace(use_cpu=False, world_size=1))
    check_in_touch(SimpleNamespace(use_cpu=True, world_size=2))


def test_a_trainer_refuses_to_train_a_model_of_its_own(second) -> None:
    from sft import SparseTrainer

    trainer = SparseTrainer.__new__(SparseTrainer)
    trainer.args = SimpleNamespace(use_cpu=False, world_size=1)
    with pytest.raises(ValueError, match=r"^use_cpu"):
        trainer.train()
