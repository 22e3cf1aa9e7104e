"""Trained values stay in the precision they were made in, whatever a trainer casts.

Over a packed base TRL casts all that is trained to bfloat16, as QLoRA's authors did. Deltas of
single weights are small beside the step of that type: most updates would round to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sft.adapters.layer import sparse_layers

Held = dict[int, Tensor]


def trained_tensors(model: Any) -> Held:
    """Return what the trained parameters of our layers hold, by identity of the parameter."""
    if not isinstance(model, torch.nn.Module):  # a name, that the trainer loads
        return {}
    return {id(p): p.data for p in _trained(model)}


def keep_precision(model: Any, before: Held) -> None:
    """Undo a cast of our layers' trained parameters.

    Args:
        model: as the trainer holds it.
        before: of `trained_tensors`. An adapter that the trainer put on is not in it: its values
            are those it begins with, and go back to float32 as they are.
    """
    for parameter in _trained(model):
        held = before.get(id(parameter))
        if held is None:
            fresh = parameter.dtype == torch.bfloat16 and _over_packed(model)
            parameter.data = parameter.data.float() if fresh else parameter.data
        elif held.dtype != parameter.dtype:
            parameter.data = held.to(parameter.device)


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    layers = sparse_layers(model).values()
    return [
        parameter
        for layer in layers
        for part in layer.adapter_layer_names
        for parameter in getattr(layer, part).values()
        if parameter.requires_grad
    ]


def _over_packed(model: torch.nn.Module) -> bool:
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit")  # what TRL goes by
    return any(getattr(model, mark, False) for mark in marks)
