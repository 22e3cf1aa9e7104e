"""Check a section of a recipe against a dataclass that we do not own: names, then types."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Container, Hashable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from sft.errors import RecipeError, one_line, unknown_name
from sft.recipe.source import Source


def check_fields(
    source: Source,
    section: str,
    owner: Any,
    values: Mapping[str, Any],
    hidden: Container[str] = (),
) -> None:
    """Raise RecipeError on the first key that `owner` lacks or whose value has the wrong type."""
    known = {
        field.name for field in dataclasses.fields(owner) if field.init and field.name not in hidden
    }
    for key, value in values.items():
        dotted = f"{section}.{key}"
        if key not in known:
            raise source.error(dotted, unknown_name(str(key), known))
        adapter, hint = _adapter(owner, key)
        try:
            adapter.validate_python(value)
        except ValidationError:
            kind = f"{value!r} ({type(value).__name__})"
            raise source.error(dotted, f"expected {describe(hint)}, got {kind}") from None


def key_error(source: Source, section: str, keys: Container[str], error: Exception) -> RecipeError:
    """Turn a config's own `key: what is wrong` into the error of that key, or of the section."""
    message = one_line(error)
    key, colon, rest = message.partition(": ")
    if colon and key in keys:
        return source.error(f"{section}.{key}", rest)
    return source.error(section, message)


def describe(hint: Any) -> str:
    """Name a type in the words of a YAML file."""
    names = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        list: "a list",
        set: "a list",
        dict: "a section",
    }
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin in names:
        return names[origin]
    return "text" if isinstance(hint, type) and issubclass(hint, str) else str(hint)


@functools.cache
def _hints(owner: Hashable) -> dict[str, Any]:
    """Resolve the annotations of a dataclass once."""
    return typing.get_type_hints(owner)


@functools.cache
def _adapter(owner: Hashable, key: str) -> tuple[TypeAdapter[Any], Any]:
    """Build the type check of one field; a type that pydantic cannot express accepts anything."""
    hint = _hints(owner)[key]
    try:
        return TypeAdapter(_with_lists(hint), config=ConfigDict(strict=True)), hint
    except PydanticSchemaGenerationError:
        return TypeAdapter(Any), hint


def _with_lists(hint: Any) -> Any:
    """Accept a list wherever a set or a tuple is asked for: YAML writes all three as lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_with_lists(argument) for argument in arguments)]  # noqa: UP007
    if origin in (set, frozenset, tuple):
        return typing.Union[hint, list]  # noqa: UP007
    return hint
