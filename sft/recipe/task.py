"""The `task:` section, and what depends on it: which metrics there are."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from sft.errors import unknown_name
from sft.evaluation.spec import EvaluationSpec
from sft.recipe.schema import Recipe
from sft.recipe.source import Source
from sft.tasks.find import task_classes


def resolve_task(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Check the section against the tasks there are; return it with every default filled in."""
    options = dict(recipe.task)
    name, known = options.pop("name", None), task_classes()
    if name not in known:
        key = "task" if isinstance(source.values.get("task"), str) else "task.name"
        if name is None:
            raise source.error(key, f"is missing; allowed: {', '.join(known)}")
        raise source.error(key, f"got {name!r}: {unknown_name(str(name), known, kind='task')}")
    owner = known[name].options_class
    try:
        resolved = owner.model_validate(options)
    except ValidationError as error:
        found = error.errors()[0]
        key, value = str(found["loc"][0]) if found["loc"] else "", found["input"]
        if found["type"] == "extra_forbidden":
            raise source.error(f"task.{key}", unknown_name(key, owner.model_fields)) from None
        if found["type"] == "missing":
            raise source.error(f"task.{key}", "is missing") from None
        text = found["msg"].removeprefix("Value error, ")
        raise source.error(f"task.{key}", f"got {value!r}; {text}") from None
    return {"name": name} | resolved.model_dump()


def resolve_evaluation(recipe: Recipe, source: Source) -> EvaluationSpec:
    """Return the section with the task's own metrics where it names none.

    Args:
        recipe: its `task` is resolved.
        source: where the values were written.
    """
    task, asked = task_classes()[recipe.task["name"]], recipe.evaluation.metrics
    if asked is None:
        return recipe.evaluation.model_copy(update={"metrics": list(task.measured)})
    for name in asked:
        if name not in task.metrics:
            text = unknown_name(name, task.metrics, kind="metric")
            raise source.error(
                f"evaluation.metrics.{asked.index(name)}",
                f"got {name!r} with task {task.name}: {text}",
            )
    return recipe.evaluation
