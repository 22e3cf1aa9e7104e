from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import sft
from sft.cli import app
from sft.recipe.shipped import SHIPPED


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """Run a command that must fail as the user's mistake: one line, exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sft: ")
    return lines[0]


def test_help_needs_no_heavy_import():
    code = (
        "import sys, sft.cli, typer.main; typer.main.get_command(sft.cli.app)\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'yaml') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_module_runs_as_a_command():
    began = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-m", "sft", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - began < 20
    for command in ("train", "validate", "export", "replay", "recipes", "env"):
        assert command in found.stdout


def test_version():
    assert run("--version").stdout == f"sft {sft.__version__}\n"


def test_recipes_are_listed_shown_and_copied(tmp_path):
    assert re.search(
        r"^quickstart +sft +spiel +.*Teach", run("recipes", "list").stdout, re.MULTILINE
    )
    text = (SHIPPED / "quickstart.yaml").read_text()
    assert run("recipes", "show", "quickstart").stdout == text
    assert run("recipes", "copy", "quickstart", tmp_path).exit_code == 0
    assert (tmp_path / "quickstart.yaml").read_text() == text
    assert "exists; give another name" in refused("recipes", "copy", "quickstart", tmp_path)
    assert "did you mean" in refused("recipes", "show", "quickstrt")
    assert "cannot be written" in refused("recipes", "copy", "quickstart", tmp_path / "no" / "x")


def test_env_is_pasteable():
    result = run("env")
    assert result.exit_code == 0
    assert "torch" in result.stdout
    assert "cpu threads" in result.stdout


def test_validate_says_ok_or_why_not(recipe_file):
    assert run("validate", recipe_file).stdout == f"{recipe_file}: ok\n"
    message = refused("validate", recipe_file, "method.densty=1")
    assert message.endswith("method.densty: unknown key; did you mean 'density'?")
    assert "no such file" in refused("validate", "nothing.yaml")


def test_a_dry_run_prints_the_recipe_and_loads_no_model(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.models.load_model", None)
    result = run("train", recipe_file, "method.density=0.25", "--dry-run")
    assert result.exit_code == 0
    assert "  density: 0.25\n" in result.stdout
    assert not (tmp_path / "run").exists()


def test_training_ends_in_a_verified_model(recipe_file, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("train", recipe_file, "--plain")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["max_logit_difference"] == 0
    assert record["after"]["nll"] < record["before"]["nll"]
    assert record["steps"] == 4
    assert record["recipe"]["method"]["density"] == 0.05
    assert {"torch", "peft", "trl"} <= record["versions"].keys()
    assert "step 4/4  loss" in result.stdout
    assert f"trains {record['trained_weights']:,} of {record['all_weights']:,}" in result.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    again = run("train", tmp_path / "run" / "recipe.yaml", f"training.output_dir={tmp_path / 'b'}")
    assert again.exit_code == 0
    twin = json.loads((tmp_path / "b" / "run.json").read_text())
    assert (twin["before"], twin["after"]) == (record["before"], record["after"])
    assert twin["train_loss"] == record["train_loss"]


def test_a_finished_run_is_not_overwritten_unless_told(recipe_file, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("old")
    (folder / "mine.txt").write_text("keep")
    (folder / "stage-7").mkdir()
    message = refused("train", recipe_file)
    assert "already holds a run (run.json); set overwrite: true" in message
    message = refused("train", recipe_file, "training.resume_from_checkpoint=auto")
    assert "holds a run (run.json) without a whole checkpoint; set overwrite: true, or" in message
    assert (folder / "run.json").read_text() == "old"
    result = run("train", recipe_file, "overwrite=true", "export.merged=false", "--plain")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "run.json").read_text())["steps"] == 4
    assert (folder / "mine.txt").read_text() == "keep"
    assert not (folder / "stage-7").exists()


def test_an_interrupted_run_goes_on_where_it_stopped(recipe_file, tmp_path):
    whole = ["training.save_strategy=steps", "training.save_steps=2", "--plain"]
    assert run("train", recipe_file, *whole).exit_code == 0
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    # the last checkpoint was cut short: auto takes the one before
    (folder / "checkpoint-4" / "sft_state.json").unlink()
    resumed = run("train", recipe_file, *whole, "training.resume_from_checkpoint=auto")
    assert resumed.exit_code == 0, resumed.output
    assert "step 4/4" in resumed.stdout
    assert "step 2/4" not in resumed.stdout
    assert json.loads((folder / "run.json").read_text())["after"] == record["after"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train=missing.jsonl", "data.train: missing.jsonl: no such file"),
        ("model.name=./missing", "model.name: ./missing: no such folder"),
        ("method.target_modules=[nothing_like_it]", "method: does not fit"),
        ("training.resume_from_checkpoint=./none", "training.resume_from_checkpoint: "),
        ("method.density=1.5", "method.density: "),
        ("data.eval_examples=64", "data.eval_examples: got 64"),
        ("a.b", "expected dotted.key=value"),
    ],
)
def test_each_kind_of_mistake_is_one_line_and_writes_nothing(recipe_file, tmp_path, override, says):
    result = run("train", recipe_file, override, "--plain")
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mixed_precision_exports_the_model_itself(recipe_file, tmp_path):
    mixed = ("training.bf16=true", "training.use_cpu=true")
    result = run("train", recipe_file, *mixed, "--plain")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["max_logit_difference"] == 0


def test_export_by_command(recipe_file, tmp_path, tiny_model):
    assert run("train", recipe_file, "export.merged=false", "--plain").exit_code == 0
    adapter, to = tmp_path / "run" / "adapter", tmp_path / "merged"
    result = run("export", adapter, "--base", tiny_model, "--to", "merged", "--out", to)
    assert result.exit_code == 0, result.output
    assert "max |logit difference| 0" in result.stdout
    assert "is not empty" in refused("export", adapter, "--to", "merged", "--out", to)


def test_an_unexpected_error_keeps_its_traceback(recipe_file, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sft.recipe.load.load_recipe", fail)
    result = run("train", recipe_file)
    assert isinstance(result.exception, RuntimeError)


def test_kernels_that_are_not_there_are_refused_before_anything_is_loaded(
    recipe_file, monkeypatch, tmp_path
):
    monkeypatch.setenv("SFT_KERNELS", "trition")
    monkeypatch.setattr("sft.models.load_model", None)
    assert "SFT_KERNELS: got 'trition', allowed is one of auto" in refused("train", recipe_file)
    assert "SFT_KERNELS: got 'trition'" in run("env").stdout
    assert not (tmp_path / "run").exists()
