"""SM3: squared-gradient statistics per row and column instead of per entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sft.kernels.sm3 import Positions, sm3_, sm3_step_
from sft.optim.base import ExactOptimizer
from sft.optim.move import moved
from sft.optim.shards import is_sharded, largest_over_ranks_, local, rows_held, zeros_like


class SM3(ExactOptimizer):
    """SM3 (`sm3_step_`) with one fp32 accumulator per row and per column of the matrix.

    Args:
        params: parameters or groups; vectors of trained values or dense tensors.
        lr: learning rate, >= 0.
        momentum: decay rate of the running mean of the update, in [0, 1); 0 keeps no buffer.
        eps: added to the accumulated square inside the root, > 0; 1e-8 floors the root at 1e-4.
        weight_decay: decoupled decay; one update shrinks a value by lr * weight_decay.
        positions: gives a parameter's `Positions`, asked at every step so that it may change
            between steps, or None for a dense one, which gets one accumulator per dimension.

    Raises:
        ValueError: an option is out of range, or positions do not fit their parameter.

    Papers: SM3, arXiv 1901.11150; SpIEL, arXiv 2401.16405 (over a support). Unlike the SpIEL code,
    the momentum of a replaced entry is reset.
    """

    per_entry = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        positions: Callable[[nn.Parameter], Positions | None] | None = None,
    ) -> None:
        self.positions = positions
        options = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)

    def accumulators(self, param: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return row (o,) and column (i,) accumulators, fp32, or None.

        None where the parameter was never stepped or has not two dimensions.
        """
        found = _accumulators(self.state.get(param, {}))
        return (found[0], found[1]) if len(found) == 2 else None

    def move_state(
        self,
        param: Tensor,
        source: Tensor,
        mean_grad: Tensor | None,
        mean_square: Tensor | None,
        updates: int,
        dim: int = 0,
    ) -> None:
        """Move the momentum by index, grown entries at 0; see `sft.optim.move.move_state`.

        Accumulators belong to rows and columns and stay, with the history of dropped entries. The
        one accumulator of a vector without positions belongs to its entries and moves.
        """
        state = self.state.get(param, {})
        if "momentum" in state:
            state["momentum"] = moved(state["momentum"], source, dim=dim)
        own = f"accumulator_{dim}"
        if own in state and self._positions(param) is None:
            state[own] = moved(state[own], source)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        options = {key: group[key] for key in ("momentum", "eps", "weight_decay")}
        options["lr"] = float(group["lr"])
        placed: list[tuple[Any, ...]] = []
        for param in params:
            assert param.grad is not None
            positions = self._positions(param)
            state = self._state(param, positions, momentum=bool(group["momentum"]))
            buffer = state.get("momentum")
            held = None if buffer is None else local(buffer)
            accumulators, positions = _held(param, _accumulators(state), positions)
            entries = (local(param.detach()), local(param.grad), accumulators, held)
            if positions is None:
                sm3_step_(*entries, **options)
            else:
                placed.append((*entries, positions))
        if placed:
            sm3_(*map(list, zip(*placed, strict=True)), **options)
        for like, accumulators in _by_mesh(params, self.state):
            largest_over_ranks_(like, accumulators)

    def _state(
        self, param: Tensor, positions: Positions | None, *, momentum: bool
    ) -> dict[str, Any]:
        """Return the state of a parameter, made where it is missing."""
        state: dict[str, Any] = self.state[param]
        if not state:
            sizes = positions.shape if positions else (param.shape or (1,))
            for i, size in enumerate(sizes):
                zeros = torch.zeros(size, dtype=torch.float32, device=param.device)
                state[f"accumulator_{i}"] = zeros
        if momentum and "momentum" not in state:
            state["momentum"] = zeros_like(param, torch.float32)
        return state

    def _positions(self, param: Tensor) -> Positions | None:
        found = self.positions(cast(nn.Parameter, param)) if self.positions else None
        if found and not found.rows.shape == found.cols.shape == param.shape:
            raise ValueError(
                f"positions: got rows {tuple(found.rows.shape)} and cols "
                f"{tuple(found.cols.shape)}, allowed is {tuple(param.shape)}, one per trained "
                "value; return None for a dense parameter"
            )
        return found


def _accumulators(state: dict[str, Any]) -> list[Tensor]:
    return [state[key] for key in sorted(state) if key.startswith("accumulator_")]


def _held(
    param: Tensor, accumulators: list[Tensor], positions: Positions | None
) -> tuple[list[Tensor], Positions | None]:
    """Return the accumulators and positions of the rows of a parameter that lie here.

    Accumulators are kept whole by every process: other processes' rows share them. Each takes the
    largest of its own rows, and after that the largest of all processes.
    """
    if not is_sharded(param):
        return accumulators, positions
    rows = rows_held(param)
    if positions is not None:
        return accumulators, Positions(positions.rows[rows], positions.cols[rows], positions.shape)
    return [accumulators[0][rows], *accumulators[1:]], None


def _by_mesh(
    params: list[Tensor], state: dict[Tensor, dict[str, Any]]
) -> list[tuple[Tensor, list[Tensor]]]:
    """Return a sharded parameter of each mesh, and the accumulators of all on it."""
    found: dict[Any, tuple[Tensor, list[Tensor]]] = {}
    for param in filter(is_sharded, params):
        mesh = param.device_mesh  # type: ignore[attr-defined]
        found.setdefault(mesh, (param, []))[1].extend(_accumulators(state[param]))
    return list(found.values())
