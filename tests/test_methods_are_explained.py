"""Each method on disk has a page that names its fields, a recipe that runs, a section in papers."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sft.adapters.registry import config_class, method_names
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.recipe.load import load_recipe
from sft.run.full import FullConfig
from sft.run.trainable import kind_of

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(params=method_names())
def method(request) -> str:
    return request.param


def named(page: str) -> set[str]:
    """Names in the first column of the tables of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    return {name for row in table for name in re.findall(r"`(\w+)`", row)}


def test_the_page_names_every_field(method) -> None:
    wanted = {field.name for field in fields(config_class(method)) if field.init}
    wanted -= kind_of(method).hidden(method)
    assert wanted - named(method) == set()


@pytest.mark.parametrize(
    ("page", "config"), [("zeroth_order", ZerothOrderConfig), ("full_and_peft", FullConfig)]
)
def test_other_pages_name_every_field(page, config) -> None:
    assert {field.name for field in fields(config)} - named(page) == set()


def test_zeroth_order_is_explained_like_a_method() -> None:
    for name in ("docs/papers.md", "README.md", "CHANGELOG.md"):
        assert "`ZerothOrderConfig`" in (ROOT / name).read_text(encoding="utf-8"), name
    assert "docs/zeroth_order.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    ways = [load_recipe(path).zeroth_order for path in RECIPES]
    shipped = [way for way in ways if way is not None]
    assert {way["sparsity"] > 0 for way in shipped} == {True, False}


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
