"""What the method of a recipe trains, and what a run does with it: one class a kind of method."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from sft.recipe.schema import Recipe
from sft.tasks.find import task_classes

# Each kind tells the names it answers to, so that a method belongs to one of them by existing.
_KINDS = (
    "sft.run.trained_adapter.SparseAdapter",
    "sft.run.full.Full",
    "sft.run.trained_adapter.StockAdapter",
)


class Trainable(Protocol):
    """A method of a recipe, put on a model.

    Raises, when built, ValueError `key: what is wrong` for settings that do not fit.
    """

    saved: ClassVar[bool]  # a run leaves an adapter folder
    name: str
    config: Any

    def __init__(self, name: str, fields: dict[str, Any], task_type: str | None) -> None: ...

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the methods of this kind."""

    @classmethod
    def config_class(cls, name: str) -> type:
        """Return the dataclass whose fields are the keys under `method:`."""

    @classmethod
    def hidden(cls, name: str) -> frozenset[str]:
        """Return the fields of it that a recipe cannot set."""

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""

    def unmerged(self) -> str | None:
        """Return why the method has no merged form, or None."""

    def attach(self, model: Any, spec: Any) -> Any:
        """Return the model as it is trained; `model` is None where it starts from random weights.

        Raises:
            ValueError: method and model do not fit.
        """

    def counts(self, model: Any) -> tuple[int, int]:
        """Return the number of trained weights, and of all weights that they are a part of."""

    def untrained(self, model: Any) -> AbstractContextManager[Any]:
        """Run the model as it was before anything was put on it."""

    def trained(self, model: Any) -> AbstractContextManager[Any]:
        """Run the model with the very weights that training used."""


def method_names() -> list[str]:
    """Return the names that `method.name` may have."""
    return sorted({name for kind in _kinds() for name in kind.names()})


def kind_of(name: str) -> type[Trainable]:
    """Return the kind that a method is of; ours come before PEFT's of the same name.

    Raises:
        KeyError: there is no such method.
    """
    for kind in _kinds():
        if name in kind.names():
            return kind
    raise KeyError(name)


def build_method(recipe: Recipe) -> Trainable:
    """Build what the resolved `method:` section of a recipe asks for, for its task."""
    fields = dict(recipe.method)
    name = fields.pop("name")
    return kind_of(name)(name, fields, task_classes()[recipe.task["name"]].peft_type)


def _kinds() -> list[type[Trainable]]:
    """Import the kinds on first use: they bring PEFT along."""
    paths = (path.rpartition(".") for path in _KINDS)
    return [getattr(importlib.import_module(module), name) for module, _, name in paths]
