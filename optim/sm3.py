"""SM3: squared-gradient statistics per row and column instead of per entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sft.optim.base import ExactOptimizer
from sft.optim.move import moved


class Positions(NamedTuple):
    """Where the entries of a vector of trained values lie in their matrix."""

    rows: Tensor  # int64 (k,), in [0, o)
    cols: Tensor  # int64 (k,), in [0, i)
    shape: tuple[int, int]  # (o, i)


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
        for param in params:
            assert param.grad is not None
            positions = self._positions(param)
            state = self.state[param]
            if not state:
                sizes = positions.shape if positions else (param.shape or (1,))
                for i, size in enumerate(sizes):
                    state[f"accumulator_{i}"] = torch.zeros(
                        size, dtype=torch.float32, device=param.device
                    )
            if group["momentum"] and "momentum" not in state:
                zeros = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
                state["momentum"] = zeros
            sm3_step_(
                param.detach(),
                param.grad,
                _accumulators(state),
                state.get("momentum"),
                positions=positions,
                lr=float(group["lr"]),
                **options,
            )

    def _positions(self, param: Tensor) -> Positions | None:
        found = self.positions(cast(nn.Parameter, param)) if self.positions else None
        if found and not found.rows.shape == found.cols.shape == param.shape:
            raise ValueError(
                f"positions: got rows {tuple(found.rows.shape)} and cols "
                f"{tuple(found.cols.shape)}, allowed is {tuple(param.shape)}, one per trained "
                "value; return None for a dense parameter"
            )
        return found


def sm3_step_(
    value: Tensor,
    grad: Tensor,
    accumulators: Sequence[Tensor],
    momentum_buffer: Tensor | None,
    *,
    positions: Positions | None = None,
    lr: float,
    momentum: float = 0.0,
    eps: float,
    weight_decay: float,
) -> None:
    """Apply one SM3 update in place, of values at positions or of a dense tensor.

        u = min(row[r], col[c]) + g^2
        row[r] = max(row[r], max of u in row r);  col[c] likewise
        s = g / sqrt(u + eps);  with momentum s = b = momentum b + (1 - momentum) s
        value = (1 - lr wd) (value - lr s)

    A dense tensor of n dimensions has n accumulators in the place of row and col.

    Args:
        value: floating, (k,) with positions, else any shape; below fp32 it is updated in fp32 and
            rounded once.
        grad: floating, shape of value.
        accumulators: fp32, row (o,) and col (i,), or one (d,) per dimension; written.
        momentum_buffer: b, fp32, shape of value; written; read only with momentum > 0.
        positions: of the values in their (o, i) matrix; None = dense.
        lr: learning rate.
        momentum: see the equation.
        eps: inside the root.
        weight_decay: wd.

    Papers: SM3-II of arXiv 1901.11150, which takes the maximum afresh at each step. Over a fixed
    set of entries that is the same; keeping the old maximum, accumulators never decrease when
    the set changes (SpIEL, arXiv 2401.16405).
    """
    work = value.to(torch.promote_types(value.dtype, torch.float32))
    grad = grad.to(torch.float32)
    covered = _cover_min(accumulators, positions, grad.shape).addcmul(grad, grad)
    _cover_max_(accumulators, positions, covered)
    update = grad * covered.add_(eps).rsqrt_()
    if momentum:
        assert momentum_buffer is not None
        update = momentum_buffer.lerp_(update, 1 - momentum)
    work.add_(update, alpha=-lr)
    if weight_decay:
        work.mul_(1 - lr * weight_decay)
    if work is not value:
        value.copy_(work)


def _accumulators(state: dict[str, Any]) -> list[Tensor]:
    return [state[key] for key in sorted(state) if key.startswith("accumulator_")]


def _cover_min(
    accumulators: Sequence[Tensor], positions: Positions | None, shape: torch.Size
) -> Tensor:
    """Return the smallest accumulator over each entry, in the shape of the values."""
    if positions:
        row, col = accumulators
        return torch.minimum(
            row.index_select(0, positions.rows), col.index_select(0, positions.cols)
        )
    smallest = accumulators[0].view(-1, *[1] * (len(accumulators) - 1))
    for dim, accumulator in enumerate(accumulators[1:], start=1):
        sizes = [-1 if i == dim else 1 for i in range(len(accumulators))]
        smallest = torch.minimum(smallest, accumulator.view(sizes))
    return smallest.reshape(shape) if len(accumulators) == 1 else smallest


def _cover_max_(
    accumulators: Sequence[Tensor], positions: Positions | None, covered: Tensor
) -> None:
    """Raise each accumulator to the largest value that it covers."""
    if positions:
        for accumulator, at in zip(accumulators, positions[:2], strict=True):
            accumulator.scatter_reduce_(0, at, covered, "amax")
        return
    covered = covered.view(-1) if len(accumulators) == 1 else covered
    if not covered.numel():
        return
    for dim, accumulator in enumerate(accumulators):
        others = [i for i in range(covered.dim()) if i != dim]
        torch.maximum(accumulator, covered.amax(others) if others else covered, out=accumulator)
