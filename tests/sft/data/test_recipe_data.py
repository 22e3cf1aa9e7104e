"""The `data:` section of a recipe, and what is wrong with it by file and line."""

from __future__ import annotations

import pytest

from sft.errors import RecipeError
from sft.recipe.load import load_recipe, to_yaml
from sft.run.job import train_from_recipe


@pytest.fixture
def recipe(recipe_file):
    """Replace the data section."""
    text = recipe_file.read_text()
    before, rest = text.split("data:\n")
    after = rest[rest.index("evaluation:") :]

    def write(section: str):
        recipe_file.write_text(f"{before}data:\n{section}{after}")
        return recipe_file

    return write


CASES = [
    ("  train:\n    - path: a\n      pth: b\n", "tiny.yaml:11: data.train.0.pth: unknown key; did"),
    ("  train:\n    - weight: 2\n", "data.train.0.path: is missing"),
    ("  train:\n    - a\n    - 5\n", "tiny.yaml:11: data.train.1: got 5; expected a path"),
    (
        "  train:\n    - path: a\n      weight: -1\n",
        "data.train.0.weight: got -1; expected",
    ),
    ("  train: 5\n", "tiny.yaml:9: data.train: got 5; expected a path, or a list"),
    ("  train: []\n", "data.train: got []"),
    ("  train:\n    - path: a\n      format: jpeg\n", "data.train.0.format: got 'jpeg'; expected"),
    (
        "  train:\n    - path: a\n      fraction: 0.5\n      examples: 5\n",
        "data.train.0.examples: got fraction as well; keep one of both",
    ),
    ("  train: a\n  streaming: true\n", "data.streaming: got true with max_steps -1"),
    (
        "  train: a\n  streaming: true\n  eval_fraction: 0.1\n",
        "data.eval_fraction: got streaming as well",
    ),
    ("  train: a\n  on_bad_row: ignore\n", "data.on_bad_row: got 'ignore'"),
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"case{i}" for i in range(len(CASES))])
def test_mistakes_are_told_by_line(recipe, case):
    section, expected = CASES[case]
    overrides = ["training.max_steps=-1"] if "max_steps" in expected else []
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(section), overrides)
    assert expected in str(caught.value)


def test_a_list_of_sources_is_read_back(recipe, tmp_path):
    section = "  train:\n    - a.jsonl\n    - path: b.jsonl\n      columns: {prompt: q}\n"
    found = load_recipe(recipe(section))
    assert [source.path for source in found.data.sources("train")] == ["a.jsonl", "b.jsonl"]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(found))
    assert load_recipe(again) == found


def test_sources_take_the_format_of_the_section_unless_they_say(recipe):
    section = "  format: text\n  train:\n    - a\n    - {path: b, format: messages}\n"
    found = load_recipe(recipe(section)).data.sources("train")
    assert [source.format for source in found] == ["text", "messages"]


def test_a_run_streams(recipe, rows):
    section = f"  train: {rows}\n  streaming: true\n  eval_examples: 8\n"
    overrides = ["export.merged=false", "evaluation.metrics=[nll]", "forgetting=false"]
    result = train_from_recipe(load_recipe(recipe(section), overrides))
    assert result.steps == 4
    assert result.after["nll"] > 0
