"""The state of a torch optimizer over sharded parameters: gathered, scattered, or made whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sft.optim.shards import is_sharded, put_, whole, zeros_like

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


class OptimizerState:
    """Reads and writes an optimizer's state by the names of its parameters.

    Names are `state//<parameter>//<key>`, and `group//<parameter>//<key>` for the numbers of the
    group that a parameter belongs to. Numbers are tensors of no dimension.

    Args:
        optimizer: a torch optimizer, without wrappers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @contextmanager
    def whole(self, parameter: Tensor) -> Iterator[None]:
        """Let a parameter's state be whole, and keep what is written to it or put in its place."""
        state = self._optimizer.state.get(parameter, {})
        shards = {key: value for key, value in state.items() if is_sharded_tensor(value)}
        state.update({key: whole(value).clone() for key, value in shards.items()})
        yield
        for key, shard in shards.items():
            put_(shard, state[key])
            state[key] = shard

    def gather(self, names: dict[int, str]) -> dict[str, Tensor]:
        """Return all state and the groups' numbers by name; collective.

        Args:
            names: of parameters by identity.
        """
        found: dict[str, Tensor] = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                name, state = names[id(parameter)], self._optimizer.state.get(parameter, {})
                found |= {f"state//{name}//{key}": _as_tensor(v) for key, v in state.items()}
                numbers = _numbers(group).items()
                found |= {f"group//{name}//{key}": _as_tensor(v) for key, v in numbers}
        return found

    def scatter(self, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
        """Take back what `gather` returned, on any number of processes.

        Args:
            names: of parameters by identity.
            tensors: equal on all processes.

        Raises:
            ValueError: they are of other parameters, or of another optimizer.
        """
        parts = _by_parameter(tensors)
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                if name not in parts:
                    raise ValueError(
                        f"resume_from_checkpoint: its optimizer has no {name!r}; resume with the "
                        "model and the method that the checkpoint is of"
                    )
                state, numbers = parts[name]
                _check_numbers(numbers, group)
                self._optimizer.state[parameter] = {
                    key: _placed(parameter, value) for key, value in state.items()
                }
                for key, value in _numbers(group).items():
                    group[key] = _like(value, numbers[key])


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of parameters by identity, without the parts that wrappers add."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        found[id(parameter)] = ".".join(parts)
    return found


def named(
    saved: dict[str, Any], groups: list[list[nn.Parameter]], names: dict[int, str]
) -> dict[str, Tensor]:
    """Return what `gather` would, of a torch optimizer's whole state dict.

    Args:
        saved: the state dict of an optimizer over whole parameters.
        groups: the parameters of another optimizer, in the same groups.
        names: of its parameters by identity.

    Raises:
        ValueError: it is of other parameters.
    """
    found: dict[str, Tensor] = {}
    kept = [options for options in saved["param_groups"] if options["params"]]
    sizes = [len(options["params"]) for options in kept], [len(group) for group in groups if group]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"resume_from_checkpoint: its optimizer has groups of {sizes[0]} parameters, the run's "
            f"{sizes[1]}; resume with the model and the method that the checkpoint is of"
        )
    for group, options in zip(filter(None, groups), kept, strict=True):
        for parameter, index in zip(group, options["params"], strict=True):
            name = names[id(parameter)]
            state = saved["state"].get(index, {})
            found |= {f"state//{name}//{key}": _as_tensor(value) for key, value in state.items()}
            numbers = _numbers(options).items()
            found |= {f"group//{name}//{key}": _as_tensor(value) for key, value in numbers}
    return found


def is_sharded_tensor(value: object) -> bool:
    """Tell whether a value of the state is a DTensor."""
    return isinstance(value, Tensor) and is_sharded(value)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return whole(value).detach().cpu().clone()
    return torch.tensor(value, dtype=torch.float64)


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group that a schedule or a load may change."""
    return {key: value for key, value in group.items() if isinstance(value, (int, float, Tensor))}


def _check_numbers(saved: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Raise ValueError if an optimizer's group was saved by one of another kind."""
    missing = sorted(_numbers(group).keys() - saved.keys())
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: its optimizer has no {missing[0]!r}, so it is another one; "
            "resume with the optimizer that the checkpoint is of (the method's, or optim)"
        )


def _like(value: Any, saved: Tensor) -> Any:
    if isinstance(value, Tensor):
        return saved.to(value)
    return type(value)(saved.item())


def _placed(parameter: Tensor, saved: Tensor) -> Tensor:
    """Return saved state as the optimizer keeps it: by rows where it has the parameter's shape."""
    if saved.shape != parameter.shape or not is_sharded(parameter):
        return saved.to(parameter.device if saved.dim() else "cpu", copy=True)
    state = zeros_like(parameter, saved.dtype)
    put_(state, saved.to(parameter.device))
    return state


def _by_parameter(
    tensors: dict[str, Tensor],
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return by parameter its state and its group's numbers."""
    found: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        kind, parameter, key = name.split("//")
        found.setdefault(parameter, ({}, {}))[kind == "group"][key] = tensor
    return found
