"""The `method:` section: `name`, plus the fields of that method's config."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from sft.errors import unknown_name
from sft.recipe.export import check_export
from sft.recipe.fields import check_fields, key_error
from sft.recipe.schema import Recipe
from sft.recipe.source import Source
from sft.run.trainable import Trainable, kind_of, method_names
from sft.tasks.find import task_classes
from sft.tasks.task import Task


def resolve_method(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Check the section against the methods there are; return it with every default filled in."""
    fields = dict(recipe.method)
    name = fields.pop("name", None)
    names = method_names()
    if name is None:
        raise source.error("method.name", f"is missing; allowed: {', '.join(names)}")
    if name not in names:
        raise source.error(
            "method.name", f"got {name!r}: {unknown_name(str(name), names, kind='method')}"
        )
    kind = kind_of(name)
    owner, hidden = kind.config_class(name), kind.hidden(name)
    check_fields(source, "method", owner, fields, hidden)
    known = {field.name for field in dataclasses.fields(owner)}
    if "seed" in known:
        fields.setdefault("seed", recipe.seed)
    try:
        method = kind(name, fields, task_classes()[recipe.task["name"]].peft_type)
    except (ValueError, TypeError, ImportError) as error:
        raise key_error(source, "method", known | {"name"}, error) from error
    _check_start(recipe, method, source)
    check_export(recipe, method, source)
    shown = (field.name for field in dataclasses.fields(owner) if field.init)
    return {"name": name} | {
        key: _plain(getattr(method.config, key)) for key in shown if key not in hidden
    }


def _check_start(recipe: Recipe, method: Trainable, source: Source) -> None:
    """Refuse random weights to a method that needs trained ones, and the other way round."""
    task = task_classes()[recipe.task["name"]]
    if recipe.model.config is not None and not method.from_scratch:
        _check_dense_start(method, task, source)
    if task.from_random and recipe.model.config is None:
        raise source.error(
            "task",
            f"{task.name} trains random weights; add model.config, with what differs or {{}}",
        )
    if method.from_scratch and recipe.model.config is None:
        raise source.error(
            "method", "trains random weights; add model.config, with what differs or {}"
        )


def _check_dense_start(method: Trainable, task: type[Task], source: Source) -> None:
    """Refuse to freeze random weights, and to train them by a task that means others."""
    text = f"asks for random weights, which {method.name} does not train"
    if method.saved:
        raise source.error(
            "model.config",
            f"{text}: an adapter's base stays as it is; set method: full, or sltrain with "
            "form: pretrain",
        )
    if not task.from_random:
        raise source.error("model.config", f"{text} with task {task.name}; set task: pretrain")


def _plain(value: Any) -> Any:
    """Spell a value the way YAML does."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
