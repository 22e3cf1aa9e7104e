"""Each method on disk has a page that names its fields, a recipe that runs, a section in papers."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sft.adapters.registry import config_class, method_names
from sft.recipe import load_recipe
from sft.trainable import kind_of

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(params=method_names())
def method(request) -> str:
    return request.param


def test_the_page_names_every_field_and_no_other(method) -> None:
    page = (ROOT / "docs" / f"{method}.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    wanted = {field.name for field in fields(config_class(method)) if field.init}
    wanted -= kind_of(method).hidden(method)
    assert wanted - named == set()


def test_the_papers_page_has_a_section_and_the_readme_a_row(method) -> None:
    name = config_class(method).__name__
    assert f"`{name}" in (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in readme
    assert f"docs/{method}.md" in readme


def test_a_shipped_recipe_runs_it(method) -> None:
    recipes = [load_recipe(path) for path in RECIPES]
    assert method in {recipe.method["name"] for recipe in recipes}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_measures_before_and_after(path) -> None:
    recipe = load_recipe(path)
    assert recipe.evaluation.metrics
    assert recipe.training["output_dir"] == f"runs/{path.stem}"
