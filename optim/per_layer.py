"""Per-layer updates: every parameter is stepped in backward, and its gradient freed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer


class PerLayerOptimizer(Optimizer):
    """Steps each parameter of another optimizer as soon as its gradient is whole.

    Peak gradient memory is that of the parameters whose gradients are computed together, not of
    the model. State, options and `state_dict` are the wrapped optimizer's own, so learning-rate
    schedules and checkpoints work as ever. In a plain loop:

        optimizer = PerLayerOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        for batch in batches:
            loss(batch).backward()  # updates as it goes
            optimizer.step()        # ends the update: hooks, schedules, what is left over

    and with gradient accumulation every backward but the last stands under `with
    optimizer.accumulating():`. While gradients accumulate, all of them are held.

    A norm over all gradients cannot be known before the first step: `max_norm` clips each tensor
    by its own norm. Loss scaling cannot work, as a step would come before the check for overflow,
    nor can several processes, whose gradients are averaged after the step.

    Args:
        optimizer: with all its parameters, none of them stepped by another.
        max_norm: largest norm of each tensor's gradient; None or 0 for no clipping.
        is_last: tells in backward whether its micro-batch is the last of an update; by default
            every one is, unless under `accumulating`.

    Raises:
        ValueError: several processes are training, or `max_norm` is out of range.
    """

    # torch's GradScaler then hands itself to us instead of looking for gradients, see `grad_scale`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_norm: float | None = None,
        is_last: Callable[[], bool] | None = None,
    ) -> None:
        _check_processes()
        if max_norm is not None and not 0 <= max_norm < float("inf"):
            raise ValueError(f"max_norm: got {max_norm!r}, allowed is a number >= 0, or None")
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._max_norm = max_norm or 0.0
        self._is_last = is_last or (lambda: True)
        self._accumulating = False
        self._stepped: set[Tensor] = set()
        self._link()
        self._places = {
            parameter: (number, position)
            for number, group in enumerate(self.param_groups)
            for position, parameter in enumerate(group["params"])
        }
        # moves nothing, but lets bitsandbytes look up what was set for single modules
        optimizer.zero_grad(set_to_none=True)
        _bare_step(optimizer)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for parameter in self._places
        ]

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Let backward add to the gradients without an update: all micro-batches but the last."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """End an update: step whatever still has a gradient, such as a window cut short.

        Raises:
            ValueError: a closure is given, whose backward would make an update of its own.
        """
        if closure is not None:
            raise ValueError("closure: got one, per-layer updates take none; call backward first")
        for parameter in self._places:
            if parameter.grad is not None:
                self._update(parameter)
        self._stepped.clear()

    def _arrived(self, parameter: Tensor) -> None:
        """Take a gradient that one backward has completed."""
        if self._accumulating or not self._is_last():
            return
        if parameter in self._stepped:
            raise RuntimeError(
                "per-layer updates: a second backward came before step(); call step() after each "
                "update and put all micro-batches but its last under optimizer.accumulating()"
            )
        self._update(parameter)
        self._stepped.add(parameter)

    def _update(self, parameter: Tensor) -> None:
        if self._max_norm:
            clip_grad_norm_([parameter], self._max_norm)
        inner, groups = self.optimizer, self.param_groups
        inner.param_groups = self._alone(parameter)
        try:
            _bare_step(inner)
        finally:
            inner.param_groups = groups
        parameter.grad = None

    def _alone(self, parameter: Tensor) -> list[dict[str, Any]]:
        """Return the groups with this parameter as the only one that can have a gradient."""
        number, position = self._places[parameter]
        empty = [{**group, "params": []} for group in self.param_groups[:number]]
        # at its own place: bitsandbytes keeps settings by number of group and parameter
        params = [_NO_GRADIENT] * position + [parameter]
        return [*empty, {**self.param_groups[number], "params": params}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups after construction: the hooks stand by then."""
        if hasattr(self, "_places"):
            raise ValueError(
                "param_groups: got one more, allowed are those of the wrapped optimizer; add the "
                "group to it before wrapping"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer, saved by it or through this one."""
        self.optimizer.load_state_dict(state_dict)
        self._link()

    def _link(self) -> None:
        """Share state and options with the wrapped optimizer."""
        self.state = self.optimizer.state
        self.param_groups = self.optimizer.param_groups

    def close(self) -> None:
        """Stop stepping in backward."""
        for hook in self._hooks:
            hook.remove()

    @property
    def grad_scale(self) -> float:
        """1: gradients must come unscaled."""
        return 1.0

    @grad_scale.setter
    def grad_scale(self, scale: object) -> None:
        raise ValueError(
            "GradScaler: got one, but per-layer updates step before an overflow is known; train "
            "in bfloat16 or float32, or without per-layer updates"
        )


_NO_GRADIENT = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def _bare_step(optimizer: Optimizer) -> None:
    """Step without the hooks of a step, which belong to a whole update and fire in ours."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


def _check_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        if count > 1:
            raise ValueError(
                f"per-layer updates: got {count} processes, whose gradients are averaged after "
                "backward; run one process, or train without per-layer updates"
            )
