"""Every shipped recipe is valid; every small one runs end to end and keeps its promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft.recipe.expected import broken
from sft.recipe.load import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
SMALL = "smollm2-135m-instruct"
KEPT = (
    "before", "after", "forgetting", "trained_weights", "all_weights", "steps", "train_loss",
    "max_logit_difference", "seconds",
)  # fmt: skip
SEVERAL = "deepspeed"  # runs in processes of its own: DeepSpeed keeps its hold on them


def small(path: Path) -> bool:
    """Whether a recipe runs here: the model is at hand."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["name"] == SMALL


def sharded(path: Path) -> bool:
    """Whether a recipe needs more than one process."""
    return SEVERAL in yaml.safe_load(path.read_text(encoding="utf-8"))["training"]


ALONE = [path for path in RECIPES if small(path) and not sharded(path)]
TOGETHER = [path for path in RECIPES if small(path) and sharded(path)]


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_is_valid_and_says_what_to_expect(path) -> None:
    recipe = load_recipe(path)
    assert recipe.expected is not None, "an expected: section"
    assert recipe.expected.metrics or recipe.expected.source
    assert recipe.expected.minutes or recipe.expected.memory_gb
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.fixture
def keep(tmp_path, record_property):
    """Return what a run has found, and note it for `--results`."""

    def kept(path: Path) -> dict:
        run = json.loads((tmp_path / "run/run.json").read_text())
        found = {"method": run["recipe"]["method"]["name"], **{key: run.get(key) for key in KEPT}}
        record_property("recipe", {path.stem: found})
        return found

    return kept


@pytest.mark.recipes
@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_a_small_recipe_keeps_its_promise(path, tmp_path, keep) -> None:
    from sft.run.job import train_from_recipe

    recipe = load_recipe(path, [f"training.output_dir={tmp_path / 'run'}"])
    train_from_recipe(recipe)
    assert broken(recipe.expected.metrics, keep(path)["after"]) == []


@pytest.mark.engines
@pytest.mark.parametrize("path", TOGETHER, ids=lambda path: path.stem)
def test_a_recipe_of_two_processes_keeps_its_promise(path, tmp_path, keep) -> None:
    command = [sys.executable, "-m", "sft", "train", str(path), "--plain", "--processes", "2"]
    done = subprocess.run(
        [*command, f"training.output_dir={tmp_path / 'run'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = keep(path)
    assert broken(load_recipe(path).expected.metrics, found["after"]) == []
    assert found["max_logit_difference"] is not None
    assert (tmp_path / "run/merged/model.safetensors").is_file()
