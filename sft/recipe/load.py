"""Recipes: one strict YAML file a job, found by path or by the name of a shipped one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sft.errors import RecipeError, unknown_name
from sft.recipe.schema import Recipe
from sft.recipe.shipped import find_recipe
from sft.recipe.source import Source, apply_overrides, read


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe; what comes back has every default filled in.

    Args:
        name_or_path: A YAML file, or the name of a shipped recipe ("quickstart").
        overrides: `dotted.key=value` settings; values are YAML.

    Raises:
        RecipeError: On anything not understood, as `file:line: dotted.key: what is wrong`.
    """
    path = find_recipe(name_or_path)
    source = apply_overrides(read(path), overrides)
    return resolve(source, path.stem)


def resolve(source: Source, name: str) -> Recipe:
    """Check a parsed recipe, section by section."""
    from sft.recipe.arguments import resolve_training
    from sft.recipe.forgetting import check_forgetting
    from sft.recipe.method import resolve_method
    from sft.recipe.task import resolve_evaluation, resolve_task
    from sft.recipe.zeroth_order import resolve_zeroth_order

    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        raise _first_error(source, error) from None
    recipe = recipe.model_copy(update={"task": resolve_task(recipe, source)})
    recipe = recipe.model_copy(
        update={
            "evaluation": resolve_evaluation(recipe, source),
            "method": resolve_method(recipe, source),
            "zeroth_order": resolve_zeroth_order(recipe, source),
            "training": resolve_training(recipe, source, name),
        }
    )
    check_forgetting(recipe, source)
    _check_streaming(recipe, source)
    return recipe


def _check_streaming(recipe: Recipe, source: Source) -> None:
    """A stream has no end that is known: the recipe says how long to train."""
    steps = recipe.training.get("max_steps", -1)
    if recipe.data.streaming and steps <= 0:
        raise source.error(
            "data.streaming", f"got true with max_steps {steps}; set training.max_steps"
        )


def to_yaml(recipe: Recipe) -> str:
    """Write a resolved recipe as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose numbers look as people write them."""


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    """Write 0.0001 as 1e-4 would be read: the shortest form that round-trips."""
    text = repr(value)
    special = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
    return dumper.represent_scalar("tag:yaml.org,2002:float", special.get(text, text))


_Dumper.add_representer(float, _represent_float)


def _first_error(source: Source, error: ValidationError) -> RecipeError:
    """Turn pydantic's first complaint into ours."""
    found = error.errors()[0]
    key = ".".join(str(part) for part in found["loc"])
    kind, value = found["type"], found["input"]
    if kind == "extra_forbidden":
        return source.error(
            key, unknown_name(str(found["loc"][-1]), _owner(found["loc"]).model_fields)
        )
    if kind == "missing":
        text = _owner(found["loc"]).model_fields[str(found["loc"][-1])].description
        return source.error(key, f"is missing ({text})" if text else "is missing")
    if kind == "value_error":  # from our own validators: "key: what is wrong"
        inner, _, message = str(found["ctx"]["error"]).partition(": ")
        return source.error(f"{key}.{inner}", message)
    if kind in ("model_type", "dict_type"):
        return source.error(key, f"expected a section of `key: value` lines, got {value!r}")
    expected = found["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return source.error(key, f"got {value!r} ({type(value).__name__}); expected {expected}")


def _owner(location: tuple[Any, ...]) -> type[BaseModel]:
    """Return the section that a location lies in."""
    owner: type[BaseModel] = Recipe
    for part in location[:-1]:
        hint = owner.model_fields[str(part)].annotation
        sections = [h for h in (hint, *get_args(hint)) if isinstance(h, type)]  # or `X | None`
        (owner,) = (inner for inner in sections if issubclass(inner, BaseModel))
    return owner
