from __future__ import annotations

import pytest

from sft.errors import RecipeError
from sft.recipe.source import apply_overrides, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2e-05", -2e-5),
        ("3.", 3.0),
        (".5", 0.5),
        ("1.5e3", 1500.0),
        ("7", 7),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("null", None),
        (".inf", float("inf")),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = parse(f"key: {text}\n", "x.yaml").values["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_key_written_twice_names_both_lines():
    with pytest.raises(RecipeError, match=r"^x\.yaml:4: method\.density: written twice .*line 2"):
        parse("method:\n  density: 1\n  name: a\n  density: 2\n", "x.yaml")


@pytest.mark.parametrize(
    ("text", "where"),
    [("", "x.yaml: "), ("- 1\n", "x.yaml:1: "), ("a: [1\nb: 2\n", "x.yaml:2: "), ("7", "x.yaml:1")],
)
def test_what_is_not_a_recipe_is_refused_with_its_line(text, where):
    with pytest.raises(RecipeError) as caught:
        parse(text, "x.yaml")
    assert str(caught.value).startswith(where)


def test_an_override_replaces_a_value_and_leaves_its_source_alone():
    source = parse("a:\n  b: 1\n  c: [1]\n", "x.yaml")
    changed = apply_overrides(source, ["a.b=2e-3", "a.d.e=[x, y]", "a.c=null"])
    assert changed.values == {"a": {"b": 2e-3, "c": None, "d": {"e": ["x", "y"]}}}
    assert source.values == {"a": {"b": 1, "c": [1]}}


def test_places_are_file_and_line_or_the_override():
    source = apply_overrides(parse("a:\n  b: 1\n", "x.yaml"), ["a.c=2"])
    assert source.where("a.b") == "x.yaml:2"
    assert source.where("a.missing") == "x.yaml:1"
    assert source.where("a.c") == "override 'a.c=2'"
    assert source.where("nowhere") == "x.yaml"


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", "a b=1", "a.b.c=1", "a=[", "a=]x"])
def test_a_malformed_override_names_itself(text):
    source = parse("a:\n  b: 1\n", "x.yaml")
    with pytest.raises(RecipeError, match=r"^override '"):
        apply_overrides(source, [text])
