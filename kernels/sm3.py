"""SM3 over many tensors at once: squared-gradient statistics per row and column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sft.kernels.library import define, implementation


class Positions(NamedTuple):
    """Where the entries of a vector of trained values lie in their matrix."""

    rows: Tensor  # int64 (k,), in [0, o)
    cols: Tensor  # int64 (k,), in [0, i)
    shape: tuple[int, int]  # (o, i)


def sm3_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Sequence[Tensor]],
    momentum_buffers: Sequence[Tensor],
    positions: Sequence[Positions],
    *,
    lr: float,
    momentum: float = 0.0,
    eps: float,
    weight_decay: float,
) -> None:
    """Apply `sm3_step_` to vectors of values at positions; on a GPU in two launches.

    The same bits at each run: the largest number does not depend on the order of comparisons.

    Args:
        values: each as for `sm3_step_`, and so on.
        grads: see there.
        accumulators: pairs of row and column, see there.
        momentum_buffers: see there; none without momentum.
        positions: see there.
        lr: see there.
        momentum: see there.
        eps: see there.
        weight_decay: see there.
    """
    if not values:
        return
    plain = implementation(values[0].device) == "torch"
    run: Callable[..., None] = one_by_one_ if plain else _sm3_
    run(
        list(values),
        list(grads),
        [row for row, _ in accumulators],
        [column for _, column in accumulators],
        list(momentum_buffers) if momentum else [],
        [at.rows for at in positions],
        [at.cols for at in positions],
        lr,
        momentum,
        eps,
        weight_decay,
    )


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


def sm3_reference(
    value: Tensor,
    grads: Sequence[Tensor],
    positions: Positions,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle of `sm3_step_`: SM3-II of arXiv 1901.11150 over a support, one number after another.

    Args:
        value: (k,) at the start, with accumulators of zero.
        grads: (k,) each, of one update after another.
        positions: see `sm3_step_`.
        lr: see there.
        eps: see there.
        weight_decay: see there.

    Returns:
        values (k,), row (o,) and column (i,) accumulators after the last update, float64.
    """
    rows, cols = positions.rows.tolist(), positions.cols.tolist()
    row, col = ([0.0] * size for size in positions.shape)
    x = value.tolist()
    for grad in grads:
        g = grad.tolist()
        # from the accumulators before this update
        covered = [min(row[r], col[c]) + d * d for r, c, d in zip(rows, cols, g, strict=True)]
        for j, (r, c) in enumerate(zip(rows, cols, strict=True)):
            row[r] = max(row[r], covered[j])
            col[c] = max(col[c], covered[j])
            x[j] -= lr * g[j] / (covered[j] + eps) ** 0.5
            x[j] -= lr * weight_decay * x[j]
    found = [torch.tensor(numbers, dtype=torch.float64) for numbers in (x, row, col)]
    return found[0], found[1], found[2]


def one_by_one_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    rows_at: Sequence[Tensor],
    columns_at: Sequence[Tensor],
    lr: float,
    momentum: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Do what `sm3_` does in torch."""
    options = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
    for i, (value, grad) in enumerate(zip(values, grads, strict=True)):
        positions = Positions(rows_at[i], columns_at[i], (len(rows[i]), len(columns[i])))
        buffer = momentum_buffers[i] if momentum_buffers else None
        sm3_step_(value, grad, (rows[i], columns[i]), buffer, positions=positions, **options)


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


_sm3_ = define(
    "sm3_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] rows, Tensor(c!)[] columns, "
    "Tensor(d!)[] momentum_buffers, Tensor[] rows_at, Tensor[] columns_at, float lr, "
    "float momentum, float eps, float weight_decay) -> ()",
    plain=one_by_one_,
    triton="sm3:sm3_",
    fake=lambda *_: None,
)
