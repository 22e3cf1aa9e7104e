"""The JSON schema of recipes, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from sft.recipe.arguments import OWNED_ELSEWHERE
from sft.recipe.schema import Recipe
from sft.run.trainable import kind_of, method_names
from sft.tasks.find import task_classes
from sft.tools.field_schema import Definitions, dataclass_schema, hoist

Schema = dict[str, Any]

DIALECT = "http://json-schema.org/draft-07/schema#"  # what editors know best
HINT = "# yaml-language-server: $schema="


def recipe_schema() -> Schema:
    """Return the schema: `method` by its name, `training` and metrics by the task."""
    from sft.optim.zeroth_order.config import ZerothOrderConfig

    found: Schema = Recipe.model_json_schema()
    definitions: Definitions = found.pop("$defs")
    sections = found["properties"]
    sections["task"] = _task(definitions)
    sections["method"] = _method(definitions)
    definitions["zeroth_order"] = dataclass_schema(ZerothOrderConfig, definitions)
    way = sections["zeroth_order"]
    way["anyOf"] = [{"$ref": "#/$defs/zeroth_order"}, {"type": "null"}]
    sections["training"] = {"type": "object", "description": "fields of the task's trainer"}
    return {
        "$schema": DIALECT,
        "title": "Recipe of sparse fine-tuning",
        "description": "One job: model, task, method, data, evaluation, training, export.",
        **{key: value for key, value in found.items() if key not in ("title", "description")},
        "allOf": _by_task(definitions),
        "$defs": definitions,
    }


def _method(definitions: Definitions) -> Schema:
    """Return the schema of `method:`: a name, and the fields of its config."""
    names = method_names()
    rules = []
    for name in names:
        owner, hidden = kind_of(name).config_class(name), kind_of(name).hidden(name)
        schema = dataclass_schema(owner, definitions, hidden)
        schema["properties"] = {"name": {"const": name}, **schema["properties"]}
        definitions[f"method.{name}"] = schema
        rules.append(_when({"name": {"const": name}}, {"$ref": f"#/$defs/method.{name}"}))
    return {
        "description": "What is trained: the name of a method, and its fields.",
        "type": "object",
        "properties": {"name": {"enum": names}},
        "required": ["name"],
        "allOf": rules,
    }


def _task(definitions: Definitions) -> Schema:
    """Return the schema of `task:`: a name, or a section with one."""
    sections = []
    for name, task in task_classes().items():
        options = hoist(task.options_class.model_json_schema(), definitions)
        properties = {"name": {"const": name}, **options.get("properties", {})}
        required = ["name", *options.get("required", [])]
        sections.append(
            {
                "type": "object",
                "description": task.summary,
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }
        )
    alone = [{"const": name, "description": t.summary} for name, t in task_classes().items()]
    return {
        "description": "What the model learns to do.",
        "default": "sft",
        "anyOf": [*alone, *sections],
    }


def _by_task(definitions: Definitions) -> list[Schema]:
    """Return, for each task, which fields `training` has and which metrics there are."""
    rules = []
    for name, task in task_classes().items():
        owner = task(task.options_class.model_construct()).arguments_class()
        training = f"training.{owner.__name__}"
        if training not in definitions:
            definitions[training] = dataclass_schema(owner, definitions, OWNED_ELSEWHERE)
        metrics = {"type": "array", "items": {"enum": list(task.metrics)}}
        measured = {"properties": {"metrics": {"anyOf": [metrics, {"type": "null"}]}}}
        then = {"properties": {"training": {"$ref": f"#/$defs/{training}"}, "evaluation": measured}}
        rules.append({"if": _is_task(name), "then": then})
    return rules


def _is_task(name: str) -> Schema:
    """Return a condition: the recipe names this task, in either form; the default needs none."""
    section = {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}
    named: Schema = {"properties": {"task": {"anyOf": [{"const": name}, section]}}}
    return named if name == "sft" else {**named, "required": ["task"]}


def _when(properties: Schema, then: Schema) -> Schema:
    return {"if": {"properties": properties, "required": list(properties)}, "then": then}
