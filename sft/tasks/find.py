"""Find the tasks, which exist by being written down."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

import sft.tasks
from sft.tasks.task import Task


@functools.cache
def task_classes() -> dict[str, type[Task]]:
    """Return all tasks by name, the default one first."""
    found: dict[str, type[Task]] = {}
    for info in pkgutil.iter_modules(sft.tasks.__path__):
        module = importlib.import_module(f"sft.tasks.{info.name}")
        kinds: list[Any] = [kind for _, kind in inspect.getmembers(module, inspect.isclass)]
        here = [kind for kind in kinds if kind.__module__ == module.__name__]
        found |= {kind.name: kind for kind in here if isinstance(getattr(kind, "name", None), str)}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "sft", item[0])))


def build_task(section: dict[str, Any]) -> Task:
    """Build what a resolved `task:` section names."""
    options = dict(section)
    kind = task_classes()[options.pop("name")]
    return kind(kind.options_class.model_validate(options))


def has_classes(task: Task | type[Task]) -> bool:
    """Tell whether a task puts a head for the classes of its data on a model."""
    return "labels" in task.options_class.model_fields
