"""Methods of a recipe that put an adapter beside a frozen model: ours, and those of stock PEFT."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from sft.adapters import registry
from sft.adapters.resident import resident
from sft.models import load_config
from sft.recipe.schema import ModelSpec

registry.register_all()

# PEFT's own bookkeeping: never set by a user.
_BOOKKEEPING = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
        "revision", "task_type",
    }
)  # fmt: skip


class StockAdapter:
    """The kind of PEFT's own methods, under their PEFT names."""

    saved: ClassVar[bool] = True

    def __init__(self, name: str, fields: dict[str, Any], task_type: str | None) -> None:
        self.name = name
        self.config = self.config_class(name)(**fields, task_type=task_type)
        if hasattr(self._tuner(), "update_and_allocate"):
            raise ValueError(
                f"name: got {name!r}, whose ranks move by calls that the trainer does not make; "
                "use lora, or sora for ranks that close"
            )

    @classmethod
    def names(cls) -> list[str]:
        """Return the names in PEFT's mapping."""
        return sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)

    @classmethod
    def config_class(cls, name: str) -> type:
        """Return the method's PeftConfig."""
        found: type = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())]
        return found

    @classmethod
    def hidden(cls, name: str) -> frozenset[str]:
        """Return PEFT's bookkeeping, and what takes an object instead of a value."""
        hints = typing.get_type_hints(cls.config_class(name))
        objects = {key for key, hint in hints.items() if _holds_dataclass(hint)}
        return _BOOKKEEPING | objects

    @property
    def from_scratch(self) -> bool:
        """Whether the configuration asks for random weights."""
        return bool(getattr(self.config, "from_scratch", False))

    def unmerged(self) -> str | None:
        """Return why the method has no merged form, or None."""
        merges = hasattr(self._tuner(), "merge_and_unload")
        return None if merges else f"{self.name} cannot be merged into the weights of a model"

    def attach(self, model: Any, spec: ModelSpec) -> Any:
        """Put the adapter on.

        Raises:
            ValueError: method and model do not fit.
        """
        return peft.get_peft_model(model, self.config)

    def counts(self, model: Any) -> tuple[int, int]:
        """Return the number of trained weights, and that of the model they come on top of."""
        trained, with_adapter = model.get_nb_trainable_parameters()
        return trained, with_adapter - trained

    def untrained(self, model: Any) -> AbstractContextManager[Any]:
        """Run the model without the adapter."""
        found: AbstractContextManager[Any] = model.disable_adapter()
        return found

    def trained(self, model: Any) -> AbstractContextManager[Any]:
        """Run the model as it stands: the adapter beside its base is what was trained."""
        return contextlib.nullcontext()

    def _tuner(self) -> Any:
        return PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type]


class SparseAdapter(StockAdapter):
    """The kind of the methods on disk, here in `sft.adapters.methods`."""

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all methods on disk."""
        return registry.method_names()

    @classmethod
    def hidden(cls, name: str) -> frozenset[str]:
        """Return PEFT's bookkeeping, and a switch for tests."""
        return _BOOKKEEPING | {"init_weights"}

    def attach(self, model: Any, spec: ModelSpec) -> Any:
        """Put the adapter on, or build a model of random weights in the form that is trained."""
        if not self.from_scratch:
            return super().attach(model, spec)
        from sft.pretrain import pretrain_model

        config = load_config(spec)
        chosen = config.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
        return pretrain_model(config, self.config, dtype=chosen or torch.float32)

    def counts(self, model: Any) -> tuple[int, int]:
        """Return the number of trained weights, and of those of the model."""
        trained, with_adapter = model.get_nb_trainable_parameters()
        return trained, with_adapter if self.from_scratch else with_adapter - trained

    def untrained(self, model: Any) -> AbstractContextManager[Any]:
        """Run the model without the adapter; from scratch there is nothing else."""
        return contextlib.nullcontext() if self.from_scratch else super().untrained(model)

    def trained(self, model: Any) -> AbstractContextManager[Any]:
        """Run the model with resident weights, not beside its base."""
        return resident(model)


def _holds_dataclass(hint: Any) -> bool:
    if dataclasses.is_dataclass(hint):
        return True
    return any(_holds_dataclass(argument) for argument in typing.get_args(hint))
