"""The state of a learning rate schedule, whichever groups of the optimizer are empty.

DeepSpeed drops groups that hold no parameter, others keep them; a schedule has an entry for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")

State = dict[str, Any]


def without_empty(state: State, groups: Sequence[Sequence[Any]]) -> State:
    """Return the state of a schedule with entries of those groups alone that hold parameters.

    Args:
        state: what a scheduler's `state_dict` returned.
        groups: the parameters of each group it has entries for.
    """
    found = dict(state)
    for key in _BY_GROUP:
        entries = state.get(key)
        if isinstance(entries, list) and len(entries) == len(groups):
            found[key] = [entry for entry, held in zip(entries, groups, strict=True) if held]
    return found


def with_empty(state: State, groups: Sequence[Sequence[Any]], own: State) -> State:
    """Return the state for a scheduler over these groups.

    Args:
        state: of `without_empty`.
        groups: the parameters of each group now.
        own: the scheduler's state so far; empty groups keep their entries of it.
    """
    found = dict(state)
    filled = [i for i, held in enumerate(groups) if held]
    for key in _BY_GROUP:
        entries = state.get(key)
        if isinstance(entries, list) and len(entries) == len(filled):
            found[key] = list(own[key])
            for i, entry in zip(filled, entries, strict=True):
                found[key][i] = entry
    return found
