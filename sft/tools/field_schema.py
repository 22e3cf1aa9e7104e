"""JSON schemas of dataclasses that we do not own: types by their annotations, texts as they say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Container
from enum import Enum
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError

from sft.errors import one_line

Schema = dict[str, Any]
Definitions = dict[str, Any]


def dataclass_schema(owner: Any, definitions: Definitions, hidden: Container[str] = ()) -> Schema:
    """Return the schema of a section whose keys are the fields of a dataclass.

    Args:
        owner: the dataclass.
        definitions: takes what the fields' types refer to.
        hidden: fields that a recipe cannot set.
    """
    hints, texts = typing.get_type_hints(owner), described(owner)
    properties = {}
    for field in dataclasses.fields(owner):
        if field.init and field.name not in hidden:
            schema = dict(type_schema(hints[field.name], definitions))
            text = field.metadata.get("help") or texts.get(field.name)
            if text:
                schema["description"] = one_line(text)
            default = _plain_default(field)
            if default is not dataclasses.MISSING:
                schema["default"] = default
            properties[field.name] = schema
    return {"type": "object", "properties": properties, "additionalProperties": False}


def type_schema(hint: Any, definitions: Definitions) -> Schema:
    """Return the schema of a type; of one that JSON cannot express, the one that takes anything."""
    try:
        found = TypeAdapter(hint).json_schema()
    except (
        PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUserError, TypeError,
    ):  # fmt: skip
        return {}
    untitled: Schema = _without(hoist(found, definitions), "title")
    return untitled


def hoist(schema: Schema, definitions: Definitions) -> Schema:
    """Move the definitions of a schema to those of the whole."""
    definitions |= schema.pop("$defs", {})
    return schema


def described(owner: Any) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say of its fields."""
    found: dict[str, str] = {}
    for kind in reversed(inspect.getmro(owner)):
        found |= _arguments(kind.__dict__.get("__doc__") or "")
    return found


def _arguments(doc: str) -> dict[str, str]:
    """Read the section Args of a docstring, in Google's form or in that of Hugging Face."""
    found = re.search(r"^[ ]*(?:Args|Parameters):[ ]*\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    if found is None:
        return {}
    text = textwrap.dedent(found.group(1))
    entries = re.split(r"^(?:[ ]{0,3})`?(\w+)`?(?:[ ]*\([^\n]*\))?:[ ]*", text, flags=re.M)
    return {name: one_line(body) for name, body in zip(entries[1::2], entries[2::2], strict=True)}


def _plain_default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field as JSON has it, or MISSING."""
    value = field.default
    if isinstance(value, Enum):
        value = value.value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return dataclasses.MISSING
    return value


def _without(schema: Any, key: str) -> Any:
    """Return a schema without a key, at any depth."""
    if isinstance(schema, dict):
        return {k: _without(v, key) for k, v in schema.items() if k != key or isinstance(v, dict)}
    return [_without(item, key) for item in schema] if isinstance(schema, list) else schema
