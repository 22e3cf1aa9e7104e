"""The schema of recipes takes what `sft validate` takes, and refuses slips in spelling."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from jsonschema import Draft7Validator

from sft.recipe.shipped import SHIPPED
from sft.recipe.source import read
from sft.run.trainable import kind_of, method_names
from sft.tasks.find import task_classes
from sft.tools.field_schema import dataclass_schema, described
from sft.tools.schema import recipe_schema

RECIPES = sorted(SHIPPED.glob("*.yaml"))


@pytest.fixture(scope="module")
def schema():
    return recipe_schema()


@pytest.fixture(scope="module")
def errors(schema):
    Draft7Validator.check_schema(schema)
    validator = Draft7Validator(schema)
    return lambda values: [f"{e.json_path}: {e.message}" for e in validator.iter_errors(values)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(errors, path) -> None:
    assert errors(read(path).values) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("method", "densty", 0.01, "'densty' was unexpected"),
        ("method", "r", 4, "'r' was unexpected"),  # of other methods
        ("method", "density", "much", "not valid under any"),
        ("method", "name", "spile", "'spile' is not one of"),
        ("training", "max_step", 5, "'max_step' was unexpected"),
        ("training", "seed", 5, "'seed' was unexpected"),  # has a key of its own
        ("model", "dtype", "float8", "'float8' is not one of"),
        ("data", "evel", "x", "'evel' was unexpected"),
        ("evaluation", "metrics", ["bleu"], "not valid under any"),
    ],
)
def test_slips_are_refused(errors, section, key, value, message) -> None:
    values = copy.deepcopy(read(SHIPPED / "quickstart.yaml").values)
    values[section][key] = value
    assert any(message in error for error in errors(values)), errors(values)


def test_sections_and_names_at_the_top(errors) -> None:
    values = copy.deepcopy(read(SHIPPED / "quickstart.yaml").values)
    assert errors({**values, "task": "sft"}) == errors({**values, "task": {"name": "sft"}}) == []
    assert errors({**values, "task": "stf"}) != []
    assert errors({**values, "modle": {}}) != []
    assert errors({key: values[key] for key in values if key != "method"}) != []


def test_every_method_has_its_fields_and_texts(schema) -> None:
    for name in method_names():
        fields = {f.name for f in dataclasses.fields(kind_of(name).config_class(name)) if f.init}
        found = schema["$defs"][f"method.{name}"]["properties"]
        assert found.keys() - {"name"} == fields - kind_of(name).hidden(name)
    ours = schema["$defs"]["method.spiel"]["properties"]
    assert all(row.get("description") for key, row in ours.items() if key != "name")


def test_every_task_is_there(schema) -> None:
    names = {row["const"] for row in schema["properties"]["task"]["anyOf"] if "const" in row}
    assert names == set(task_classes())
    assert schema["$defs"]["training.SFTConfig"]["properties"]["packing"]["type"] == "boolean"


def test_a_field_is_described_by_its_docstring() -> None:
    @dataclasses.dataclass
    class Base:
        """What is shared.

        Args:
            one: the first,
                on two lines.
        """

        one: int = 1

    @dataclasses.dataclass
    class Own(Base):
        """More.

        Args:
            two (`str`, *optional*): the second.
        """

        two: str | None = None
        odd: object = dataclasses.field(default_factory=object)

    assert described(Own) == {"one": "the first, on two lines.", "two": "the second."}
    found = dataclass_schema(Own, {})["properties"]
    assert found["one"] == {
        "type": "integer",
        "description": "the first, on two lines.",
        "default": 1,
    }
    assert found["odd"] == {}
