"""The `zeroth_order:` section of a recipe, and runs that train by forward passes alone."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sft.cli import app
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.recipe.load import load_recipe, to_yaml
from sft.run.job import train_from_recipe

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
FULL = "method={name: full}"


def test_the_resolved_section_shows_every_default_and_reads_back(recipe_file, tmp_path) -> None:
    recipe = load_recipe(recipe_file, [FULL, "zeroth_order={eps: 0.01}", "seed=7"])
    shown = recipe.zeroth_order
    assert set(shown) == {field.name for field in dataclasses.fields(ZerothOrderConfig)}
    assert (shown["eps"], shown["queries"], shown["seed"]) == (0.01, 1, 7)
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "tiny.yaml"
    again.write_text(to_yaml(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("section", ["null", None])
def test_no_section_is_a_first_order_run(recipe_file, section) -> None:
    settings = [] if section is None else [f"zeroth_order={section}"]
    assert load_recipe(recipe_file, settings).zeroth_order is None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("zeroth_order.esp=1", "zeroth_order.esp: unknown key; did you mean 'eps'?"),
        ("zeroth_order.eps=0", "zeroth_order.eps: got 0, allowed is a number > 0"),
        ("zeroth_order.eps=big", "zeroth_order.eps: expected a number, got 'big' (str)"),
        ("zeroth_order.queries=1.5", "zeroth_order.queries: expected a whole number, got 1.5"),
        ("zeroth_order.sparsity=1", "zeroth_order.sparsity: got 1, allowed is a share in [0, 1)"),
        ("zeroth_order.update=sgdd", "zeroth_order.update: got 'sgdd', allowed is one of sgd, "),
        ("zeroth_order.betas=[0.9]", "zeroth_order.betas: got "),
        ("zeroth_order.clip=.inf", "zeroth_order.clip: got inf, allowed is a finite number > 0,"),
        ("zeroth_order.divergence=.inf", "zeroth_order.divergence: got inf, allowed is a finite"),
        ("zeroth_order.objective=acuracy", "zeroth_order.objective: got 'acuracy': unknown"),
        ("zeroth_order.objective=[f1]", "zeroth_order.objective: got ['f1']: unknown"),
        ("zeroth_order=yes please", "zeroth_order: expected a section of `key: value` lines"),
    ],
)
def test_a_bad_field_is_one_line_that_names_it(refused_recipe, setting, says) -> None:
    message = refused_recipe(FULL, setting)
    assert message.startswith(f"override '{setting}': {says}")


def test_the_line_of_the_file_is_named(refused_recipe, recipe_file) -> None:
    text = recipe_file.read_text()
    recipe_file.write_text(text + "zeroth_order:\n  queries: 2\n  noise: whyte\n")
    line = recipe_file.read_text().count("\n")
    message = refused_recipe(FULL)
    assert message.startswith(f"tiny.yaml:{line}: zeroth_order.noise: got 'whyte', allowed is one")
    result = CliRunner().invoke(app, ["validate", str(recipe_file), FULL])
    assert (result.exit_code, result.stderr) == (2, f"sft: {message}\n")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{name: spiel}", "method.growth: got 'gradient', which zeroth_order cannot serve; set no"),
        ("{name: sora}", "method.strength: got 0.1, which zeroth_order cannot serve; set 0"),
        ("{name: sltrain, per_layer_updates: true}", "method.per_layer_updates: got True, which"),
        ("{name: s2ft, optimizer: sm3}", "method.optimizer: got 'sm3', which zeroth_order cannot"),
    ],
)
def test_settings_that_need_gradients_are_refused(
    refused_recipe, recipe_file, method, says
) -> None:
    assert says in refused_recipe(f"method={method}", "zeroth_order={}")
    load_recipe(recipe_file, [f"method={method}"])


def test_what_no_run_could_do_is_refused_before_any_is_started(refused_recipe) -> None:
    lora = "method={name: lora, target_modules: [q_proj]}"
    assert (
        "zeroth_order.sparsity: got 0.5 for lora, an adapter, whose weights start at zero"
        in refused_recipe(lora, "zeroth_order={sparsity: 0.5}")
    )
    decayed = [FULL, "zeroth_order={update: conservative}", "training.weight_decay=0.1"]
    assert "training.weight_decay: got 0.1, which would move away" in refused_recipe(*decayed)


def test_a_first_order_optimizer_is_refused(refused_recipe) -> None:
    message = refused_recipe(FULL, "zeroth_order={}", "training.optim=adafactor")
    assert "training.optim: names an optimizer, and zeroth_order has its own rule" in message


def test_what_the_trainer_refuses_is_one_line_and_leaves_a_former_run(
    recipe_file, tmp_path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("old")
    settings = [FULL, "zeroth_order={}", "training.torch_compile=true", "overwrite=true"]
    result = CliRunner().invoke(app, ["train", str(recipe_file), *settings])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sft: training: torch_compile: got True, whose graphs the hooks of ")
    assert (tmp_path / "run" / "run.json").read_text() == "old"


@pytest.mark.parametrize(
    "method",
    [
        "{name: full}",
        "{name: lora, r: 2, target_modules: [q_proj]}",
        "{name: spiel, growth: none, density: 0.1}",
    ],
)
def test_a_run_by_forward_passes_leaves_its_log(recipe_file, method) -> None:
    settings = ["zeroth_order={queries: 2}", "training.learning_rate=1e-3"]
    recipe = load_recipe(recipe_file, [f"method={method}", *settings])
    console = Console(file=io.StringIO(), width=200)
    run = train_from_recipe(recipe, console)
    assert "by forward passes" in console.file.getvalue()
    assert run.max_logit_difference < 1e-6
    folder = run.output_dir / "zeroth_order"
    log = ZerothOrderLog.load(folder / "log.safetensors")
    assert len(log) == run.steps == 4
    assert log.header["queries"] == 2
    assert run.trained_weights == sum(_size(row[1]) for row in log.header["trained"])
    adapted = "full" not in method
    assert (folder / "start/adapter_config.json").is_file() == adapted
    assert (run.output_dir / "adapter").is_dir() == adapted
    record = json.loads((run.output_dir / "run.json").read_text())
    assert record["recipe"]["zeroth_order"]["queries"] == 2


def test_a_new_run_clears_the_log_of_the_former(recipe_file) -> None:
    short = ["training.max_steps=1", "export.merged=false", FULL]
    console = Console(file=io.StringIO(), width=200)
    run = train_from_recipe(load_recipe(recipe_file, [*short, "zeroth_order={}"]), console)
    assert "export.merged is false: the weights stay in checkpoints" in console.file.getvalue()
    assert (run.output_dir / "zeroth_order/log.safetensors").is_file()
    train_from_recipe(load_recipe(recipe_file, [*short, "overwrite=true"]))
    assert not (run.output_dir / "zeroth_order").exists()


def _size(shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
