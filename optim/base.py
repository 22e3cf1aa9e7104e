"""What the optimizers share: checked options, a step over the parameters that have a gradient, and
a restore that brings every state tensor back in the dtype it was saved in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor


class ExactOptimizer(torch.optim.Optimizer):
    """An optimizer whose state survives a save and a load bit for bit, whatever the dtypes.

    A subclass fills `self.state[param]` in `_step_group` and names in `per_entry` the state
    tensors that have the shape of their parameter.
    """

    per_entry: ClassVar[tuple[str, ...]] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raise ValueError when one of its options is out of range."""
        for key, value in {**self.defaults, **param_group}.items():
            _check(key, value)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the closure's loss, if given one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options and state; raise ValueError when a state tensor does not fit.

        Unlike torch, which casts state to the dtype of its parameter (fp32 moments of a bf16
        parameter come back as bf16), dtypes stay as saved, and tensors are copied, not shared.
        """
        seen: list[dict[str, Any]] = []
        # Registered last, so it sees what the caller's own hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, saved: seen.append(saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved_ids = (i for group in seen[0]["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for saved_id, param in zip(saved_ids, params, strict=True):
            if saved_id in seen[0]["state"]:
                self.state[param] = self._restored(param, seen[0]["state"][saved_id])

    def _restored(self, param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        for key in self.per_entry:
            if key in saved and saved[key].shape != param.shape:
                raise ValueError(
                    f"{key}: got shape {tuple(saved[key].shape)}, its parameter has shape "
                    f"{tuple(param.shape)}; load the optimizer state saved with this very model"
                )
        return {
            key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in saved.items()
        }


_Test = Callable[[Any], bool]
_RANGES: dict[str, tuple[_Test, str]] = {
    "lr": (lambda x: _within(x, 0, math.inf), "a finite number >= 0; use for example 1e-3"),
    "weight_decay": (lambda x: _within(x, 0, math.inf), "a finite number >= 0; use 0 for none"),
    # Zero is refused: an entry that never saw a gradient would divide 0 by 0.
    "eps": (lambda x: x and _within(x, 0, math.inf), "a finite number > 0; use for example 1e-8"),
    "momentum": (lambda x: _within(x, 0, 1), "a number in [0, 1); use 0 for none"),
    "betas": (
        lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(_within(b, 0, 1) for b in x),
        "a pair of numbers in [0, 1); use for example (0.9, 0.999)",
    ),
}


def _within(x: Any, low: float, high: float) -> bool:
    return isinstance(x, (int, float)) and low <= x < high


def _check(key: str, value: Any) -> None:
    if key not in _RANGES:
        return
    fits, allowed = _RANGES[key]
    if not fits(value):
        raise ValueError(f"{key}: got {value!r}, allowed is {allowed}")
