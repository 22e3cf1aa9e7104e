"""Every shipped recipe is valid; every small one runs end to end and keeps its promise."""

from __future__ import annotations

import json
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
SEVERAL = "deepspeed"  # runs in processes of its own, tests/test_end_to_end.py


def small(path: Path) -> bool:
    """Whether a recipe runs here: the model is at hand, and one process is enough."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    return recipe["model"]["name"] == SMALL and SEVERAL not in recipe["training"]


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_is_valid_and_says_what_to_expect(path) -> None:
    recipe = load_recipe(path)
    assert recipe.expected is not None, "an expected: section"
    assert recipe.expected.metrics or recipe.expected.source
    assert recipe.expected.minutes or recipe.expected.memory_gb
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.recipes
@pytest.mark.parametrize("path", [p for p in RECIPES if small(p)], ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_a_small_recipe_keeps_its_promise(path, tmp_path, record_property) -> None:
    from sft.run.job import train_from_recipe

    recipe = load_recipe(path, [f"training.output_dir={tmp_path / 'run'}"])
    train_from_recipe(recipe)
    run = json.loads((tmp_path / "run/run.json").read_text())
    kept = {key: run.get(key) for key in KEPT}
    record_property("recipe", {path.stem: {"method": recipe.method["name"], **kept}})
    assert broken(recipe.expected.metrics, run["after"]) == []
