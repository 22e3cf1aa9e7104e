"""`sft eval` and `sft chat` on runs, adapters, deltas and models."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sft.cli import app
from sft.errors import UserError
from sft.evaluation.target import find_target, trained_on
from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A run, with its record."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["one", "two", "three", "four"]
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{a} {b} ->", "completion": f" {b} {a}"}) + "\n"
            for a in words
            for b in words
        )
    )
    path = tmp_path_factory.mktemp("runs") / "tiny.yaml"
    path.write_text(
        f"""\
model: {{name: {tiny_model}}}
method: {{name: spiel, density: 0.2}}
data: {{train: {rows}, eval_examples: 6}}
evaluation: {{metrics: [nll, exact_match], max_new_tokens: 3, batch_size: 4}}
forgetting: {{max_tokens: 60}}
training:
  output_dir: {path.parent / "run"}
  max_steps: 3
  learning_rate: 3e-2
  per_device_train_batch_size: 4
  save_strategy: no
"""
    )
    return train_from_recipe(load_recipe(path), Console(file=io.StringIO())).output_dir


def sft(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("part", ["", "adapter", "merged"])
def test_a_run_and_its_parts_are_measured_as_the_run_was(folder, part):
    record = json.loads((folder / "run.json").read_text())
    found = json.loads(sft("eval", folder / part, "--json"))
    assert found["metrics"] == pytest.approx(record["after"], rel=1e-5)
    assert (found["examples"], found["task"]) == (6, "sft")


def test_the_base_stands_beside(folder):
    record = json.loads((folder / "run.json").read_text())
    found = json.loads(sft("eval", folder, "--compare", "--forgetting", "--json"))
    assert found["base"] == pytest.approx(record["before"], rel=1e-5)
    for key in ("loss_before", "loss_after", "kl"):
        assert found["forgetting"][key] == pytest.approx(record["forgetting"][key], rel=1e-4)
    printed = sft("eval", folder, "--compare")
    assert "base" in printed
    assert f"{record['after']['nll']:.4f}" in printed


def test_a_model_is_measured_by_a_recipe_or_by_data(folder, tiny_model, tmp_path):
    record = json.loads((folder / "run.json").read_text())
    found = json.loads(sft("eval", tiny_model, "--recipe", folder / "recipe.yaml", "--json"))
    assert found["metrics"] == pytest.approx(record["before"], rel=1e-5)
    rows = tmp_path / "more.jsonl"
    rows.write_text('{"prompt": "one ->", "completion": " two"}\n' * 3)
    found = json.loads(
        sft(
            "eval", tiny_model, "--data", rows, "--metrics", "perplexity", "--examples", 2, "--json"
        )
    )
    assert list(found["metrics"]) == ["perplexity"]
    assert found["examples"] == 2
    text = sft("eval", tiny_model, "--data", rows, "--forgetting")
    assert "general text: loss" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{run}", "--metrics", "nul"],
            "--metrics: got 'nul': unknown metric; did you mean 'nll'?",
        ),
        (["{model}"], "is of no run; give --data or --recipe"),
        (["{run}/merged", "--compare"], "--compare: {run}/merged is a whole model"),
        (["{run}/merged", "--base", "x"], "--base: got x, but {run}/merged is a whole model"),
        (["{run}", "--data", "none.jsonl"], "--data: none.jsonl: no such file"),
        (["{run}", "--data", "{bad}"], "--data: {bad}:2: 'prompt' is missing; mend the row"),
    ],
    ids=["metric", "no-data", "no-base", "whole", "no-file", "bad-row"],
)
def test_what_cannot_be_measured_is_one_line(folder, tiny_model, tmp_path, arguments, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "one", "completion": "two"}\n{"prompt": null, "completion": "x"}\n')
    places = {"run": folder, "model": tiny_model, "bad": bad}
    printed = refused("eval", *(argument.format(**places) for argument in arguments))
    assert message.format(**places) in printed
    assert "data.train" not in printed and "data.on_bad_row" not in printed


def test_a_run_that_has_not_ended_is_named(folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="holds neither adapter nor merged; the run has not ended"):
        find_target(str(tmp_path))


def test_an_adapter_alone_names_its_base(folder, tiny_model, tmp_path):
    import shutil

    alone = shutil.copytree(folder / "adapter", tmp_path / "alone")
    found = find_target(str(alone))
    assert (found.spec.name, found.adapter, found.recipe) == (str(tiny_model), alone, None)
    assert find_target(str(alone), base="other/model").spec.name == "other/model"


def test_a_run_on_completions_is_continued_without_a_template(folder):
    for part in ("", "adapter", "merged"):
        assert trained_on(find_target(str(folder / part))) == "prompt_completion"


def test_a_chat_answers_once_or_line_by_line(folder):
    once = sft("chat", folder, "--raw", "--once", "one two ->", "--max-new-tokens", 3)
    record = json.loads((folder / "run.json").read_text())
    sample = record["samples"][0]
    again = sft("chat", folder, "--raw", "--once", sample["prompt"], "--max-new-tokens", 3)
    assert again.split() == sample["after"].split()
    lines = "one two ->\n/base\none two ->\n/quit\n"
    done = CliRunner().invoke(app, ["chat", str(folder), "--raw", "--max-new-tokens", "3"], lines)
    assert done.exit_code == 0
    assert once.strip() in done.output
    assert "the adapter is off" in done.output
