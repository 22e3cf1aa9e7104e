"""Trained values in float32, where the engine trains with a copy of fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.gathered import is_partitioned
from sft.engines.optimizer_state import names_of


def value_key(name: str) -> str:
    """Return the name under which an engine's state holds the values of a parameter."""
    return f"value//{name}//"


def is_value(key: str) -> bool:
    """Tell whether a tensor of an engine's state is a parameter's values."""
    return key.startswith("value//")


def full_precision(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what is trained in float32, before an engine casts it."""
    names = names_of(model)
    return {
        value_key(names[id(p)]): p.detach().clone()
        for p in model.parameters()
        if p.requires_grad and p.dtype == torch.float32 and not is_partitioned(p)
    }


def load_values(engine: Any, values: dict[str, Tensor]) -> None:
    """Give values to an engine that keeps them apart from the parameters."""
    if values and hasattr(engine, "load_values"):
        engine.load_values(values)


def values_of(engine: Any) -> dict[str, Tensor]:
    """Return by parameter name the values that an engine keeps apart; collective."""
    return engine.values() if hasattr(engine, "values") else {}
