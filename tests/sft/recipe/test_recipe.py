from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from sft.errors import RecipeError
from sft.recipe.fields import describe
from sft.recipe.load import load_recipe, to_yaml
from sft.recipe.shipped import SHIPPED, find_recipe, shipped_recipes


def broken(recipe_file, before, after):
    text = recipe_file.read_text()
    assert before in text
    recipe_file.write_text(text.replace(before, after))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def line_of(recipe_file, text):
    return next(i for i, line in enumerate(recipe_file.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("before", "after", "key", "says"),
    [
        ("density:", "densty:", "method.densty", "unknown key; did you mean 'density'?"),
        ("learning_rate:", "learning_rat:", "training.learning_rat", "mean 'learning_rate'?"),
        ("eval_examples:", "eval_example:", "data.eval_example", "mean 'eval_examples'?"),
        ("evaluation:", "evaluaton:", "evaluaton", "did you mean 'evaluation'?"),
        ("0.05", "many", "method.density", "expected a number or null, got 'many' (str)"),
        ("0.05", "2.0", "method.density", "2.0"),
        ("density: 0.05", "density: 0", "method.density", "got 0"),
        ("name: spiel", "name: spile", "method.name", "unknown method; did you mean 'spiel'?"),
        ("max_steps: 4", "max_steps: four", "training.max_steps", "expected a whole number"),
        ("max_steps: 4", "max_steps: true", "training.max_steps", "expected a whole number"),
        ("max_steps: 4", "seed: 4", "training.seed", "the top-level `seed`"),
        ("max_new_tokens: 4", "max_new_tokens: 0", "evaluation.max_new_tokens", "got 0"),
        ("nll", "preplexity", "evaluation.metrics.0", "perplexity"),
        ("eval_examples: 8", "eval_fraction: 1.5", "data.eval_fraction", "got 1.5"),
        ("learning_rate: 1e-2", "learning_rate: 1e-2x", "training.learning_rate", "a number"),
        ("reselect_every: 2", "reselect_every: 2.5", "method.reselect_every", "whole number"),
    ],
)
def test_a_bad_key_or_value_names_file_line_key_and_remedy(recipe_file, before, after, key, says):
    message = broken(recipe_file, before, after)
    line = line_of(recipe_file, after)
    assert message.startswith(f"tiny.yaml:{line}: {key}: ")
    assert says in message


def test_a_missing_section_or_name_is_named(recipe_file):
    assert "method.name: is missing; allowed: " in broken(recipe_file, "  name: spiel\n", "")


def test_only_one_way_to_hold_out(recipe_file):
    message = broken(recipe_file, "eval_examples: 8", "eval_examples: 8\n  eval_fraction: 0.1")
    assert re.match(r"tiny\.yaml:\d+: data\.eval_examples: got eval_fraction as well", message)


def test_an_error_of_the_training_arguments_is_one_line(recipe_file):
    message = broken(recipe_file, "save_strategy: no", "save_strategy: sometimes")
    assert message.startswith("tiny.yaml:")
    assert "training" in message
    assert "sometimes" in message


def test_an_override_wins_and_its_errors_name_it(recipe_file):
    recipe = load_recipe(recipe_file, ["method.density=0.1", "training.max_steps=7"])
    assert recipe.method["density"] == 0.1
    assert recipe.training["max_steps"] == 7
    with pytest.raises(RecipeError, match=r"^override 'method\.densty=1': method\.densty: unknown"):
        load_recipe(recipe_file, ["method.densty=1"])


def test_the_seed_reaches_the_method_unless_it_has_its_own(recipe_file):
    assert load_recipe(recipe_file, ["seed=5"]).method["seed"] == 5
    assert load_recipe(recipe_file, ["seed=5", "method.seed=1"]).method["seed"] == 1


def test_defaults_fit_a_machine_without_a_gpu(recipe_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    training = load_recipe(recipe_file).training
    assert training["bf16"] is False
    assert training["report_to"] == "none"
    assert False in (
        training.get("activation_checkpointing"), training.get("gradient_checkpointing")
    )  # fmt: skip


def test_a_resolved_recipe_reads_back_as_itself(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe))
    assert load_recipe(again) == recipe


def test_a_recipe_is_found_by_path_or_name(tmp_path):
    assert find_recipe("quickstart") == SHIPPED / "quickstart.yaml"
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        find_recipe("quickstrat")
    with pytest.raises(RecipeError, match="is a folder"):
        find_recipe(tmp_path)


@pytest.mark.parametrize("name", [name for name, _ in shipped_recipes()])
def test_every_shipped_recipe_is_valid_and_says_what_it_does(name):
    recipe = load_recipe(name)
    assert recipe.training["output_dir"] == f"runs/{name}"
    assert dict(shipped_recipes())[name].endswith(".")
    assert yaml.safe_load(to_yaml(recipe))["method"]["name"] == recipe.method["name"]


def test_types_are_named_in_the_words_of_yaml():
    @dataclasses.dataclass
    class Owner:
        pass

    assert describe(int | None) == "a whole number or null"
    assert describe(list[str] | str) == "a list or text"
    assert describe(dict[str, int]) == "a section"
