"""The `method:` section: `name`, plus the fields of that method's config."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from sft.errors import unknown_name
from sft.fields import check_fields, key_error
from sft.schema import Recipe
from sft.yaml_source import Source

# PEFT's own bookkeeping, and a switch for tests: never set by a user.
HIDDEN = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_weights",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


def resolve_method(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Check the section against the registry; return it with every default filled in."""
    registry = _registry()
    fields = dict(recipe.method)
    name = fields.pop("name", None)
    names = registry.method_names()
    if name is None:
        raise source.error("method.name", f"is missing; allowed: {', '.join(names)}")
    if name not in names:
        raise source.error(
            "method.name", f"got {name!r}: {unknown_name(str(name), names, kind='method')}"
        )
    owner = registry.config_class(name)
    check_fields(source, "method", owner, fields, HIDDEN)
    known = {field.name for field in dataclasses.fields(owner)}
    if "seed" in known:
        fields.setdefault("seed", recipe.seed)
    try:
        config = build_method({"name": name} | fields)
    except (ValueError, TypeError) as error:
        raise key_error(source, "method", known, error) from error
    _check_start(recipe, config, source)
    shown = (field.name for field in dataclasses.fields(owner) if field.init)
    return {"name": name} | {
        key: _plain(getattr(config, key)) for key in shown if key not in HIDDEN
    }


def _check_start(recipe: Recipe, config: Any, source: Source) -> None:
    """Refuse random weights to a method that needs trained ones, and the other way round."""
    from_scratch = getattr(config, "from_scratch", False)
    if recipe.model.config is not None and not from_scratch:
        raise source.error(
            "model.config", f"asks for random weights, which {recipe.method['name']} does not train"
        )
    if from_scratch and recipe.model.config is None:
        raise source.error(
            "method", "trains random weights; add model.config, with what differs or {}"
        )


def build_method(method: dict[str, Any]) -> Any:
    """Build the PeftConfig of a resolved `method:` section."""
    fields = dict(method)
    return _registry().config_class(fields.pop("name"))(**fields, task_type="CAUSAL_LM")


def _registry() -> Any:
    """Import the registry after PEFT, whose import makes our methods known to it."""
    import peft  # noqa: F401

    from sft.adapters import registry

    registry.register_all()
    return registry


def _plain(value: Any) -> Any:
    """Spell a value the way YAML does."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
