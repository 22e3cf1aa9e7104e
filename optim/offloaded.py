"""An optimizer whose state lies on the CPU, and that steps there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sft.optim.move import move_state

MASTERS = "masters"


class OffloadedOptimizer(torch.optim.Optimizer):
    """Steps on the CPU for parameters that lie elsewhere.

    Each parameter has a stand-in on the CPU, in float32 or wider: a gradient goes there, the
    optimizer steps, and the values come back. Moments exist on the CPU alone. Of a parameter in
    half precision the stand-in is the master copy: it keeps what rounding would lose. Whoever
    writes to a parameter between steps is noticed.

    Args:
        inner: an optimizer that has not stepped; from now on it holds the stand-ins.

    Raises:
        ValueError: it has state already.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        if inner.state:
            raise ValueError(
                f"inner: got {type(inner).__name__} with state, allowed is one that has not "
                "stepped; wrap it before training"
            )
        self.inner = inner
        super().__init__([{**group} for group in inner.param_groups], dict(inner.defaults))
        self._stand_ins: dict[int, Tensor] = {}
        for own, group in zip(self.param_groups, inner.param_groups, strict=True):
            group["params"] = [self._made(parameter) for parameter in own["params"]]

    @property
    def state(self) -> Any:
        """The state of the optimizer that steps, by stand-in."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        """Torch's constructor and loading set one; there is one already."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the closure's loss, if given one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [pair for pair in self._pairs() if pair[0].grad is not None]
        for parameter, stand_in in stepped:
            self._lend(parameter, stand_in)
            assert parameter.grad is not None
            stand_in.grad = _sent(parameter.grad, stand_in)
        _wait(stepped)
        for own, group in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        self.inner.step()
        for parameter, stand_in in stepped:
            stand_in.grad = None
            parameter.copy_(stand_in, non_blocking=True)
        return loss

    @torch.no_grad()
    def move_state(
        self,
        param: Tensor,
        source: Tensor,
        mean_grad: Tensor | None,
        mean_square: Tensor | None,
        updates: int,
        dim: int = 0,
    ) -> None:
        """Move state by index and seed grown entries; see `sft.optim.move.move_state`."""
        stand_in = self._stand_ins[id(param)]
        self._lend(param, stand_in)
        move_state(
            self.inner,
            stand_in,
            source.cpu(),
            dim=dim,
            mean_grad=None if mean_grad is None else mean_grad.cpu(),
            mean_square=None if mean_square is None else mean_square.cpu(),
            updates=updates,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, and the masters of what is in half precision."""
        found = dict(self.inner.state_dict())
        for own, saved in zip(self.param_groups, found["param_groups"], strict=True):
            saved.update({key: value for key, value in own.items() if key != "params"})
        found[MASTERS] = {
            i: stand_in.detach()
            for i, (parameter, stand_in) in enumerate(self._pairs())
            if parameter.dtype != stand_in.dtype
        }
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options, state and masters."""
        saved = dict(state_dict)
        masters = saved.pop(MASTERS, {})
        self.inner.load_state_dict(saved)
        self.take_options()
        for i, (_, stand_in) in enumerate(self._pairs()):
            if i in masters:
                stand_in.copy_(masters[i])

    def stand_in_names(self, names: dict[int, str]) -> dict[int, str]:
        """Return the names of the stand-ins by identity, given those of the parameters."""
        return {id(stand_in): names[id(parameter)] for parameter, stand_in in self._pairs()}

    def take_options(self) -> None:
        """Take the options of the inner optimizer's groups, which were loaded."""
        for own, group in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its stand-in."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, self._stand_ins[id(parameter)]

    def _made(self, parameter: Tensor) -> Tensor:
        stand_in = torch.empty(
            parameter.shape, dtype=_wide(parameter.dtype), pin_memory=parameter.is_cuda
        )
        self._stand_ins[id(parameter)] = stand_in.copy_(parameter.detach())
        return stand_in.requires_grad_()

    def _lend(self, parameter: Tensor, stand_in: Tensor) -> None:
        """Bring the stand-in to what the parameter is, which others may have written to."""
        if parameter.shape != stand_in.shape:  # ranks or entries were taken out
            stand_in.data = parameter.detach().to("cpu", stand_in.dtype, copy=True)
        elif parameter.dtype == stand_in.dtype:
            stand_in.copy_(parameter, non_blocking=True)
        else:
            now = parameter.detach().cpu()
            same = stand_in.to(now.dtype) == now
            stand_in.copy_(torch.where(same, stand_in, now.to(stand_in.dtype)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sent(grad: Tensor, stand_in: Tensor) -> Tensor:
    """Return a gradient as the stand-in wants it; on its way, if it comes from a GPU."""
    landing = torch.empty(grad.shape, dtype=stand_in.dtype, pin_memory=grad.is_cuda)
    return landing.copy_(grad, non_blocking=True)


def _wait(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Wait for what is on its way from the GPU."""
    for device in {parameter.device for parameter, _ in pairs if parameter.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
