"""Moves optimizer state along when trained entries, rows or columns permute, drop and grow."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sft.optim.bnb_state import BLOCK, dequantised, requantise_


@runtime_checkable
class MovesOwnState(Protocol):
    """An optimizer that knows how its own per-entry state moves."""

    def move_state(
        self,
        param: Tensor,
        source: Tensor,
        mean_grad: Tensor | None,
        mean_square: Tensor | None,
        updates: int,
        dim: int = 0,
    ) -> None:
        """See the function `move_state`."""


def move_state(
    optimizer: torch.optim.Optimizer,
    param: Tensor,
    source: Tensor,
    *,
    dim: int = 0,
    mean_grad: Tensor | None = None,
    mean_square: Tensor | None = None,
    updates: int = 0,
) -> None:
    """Give every slice of `param` along `dim` the optimizer state of the slice it was, or a seed.

    state'[j] = state[source[j]] where source[j] >= 0, bit for bit. Grown slices (-1) start at 0;
    Adam's moments start at mean * (1 - beta^t), so that the next bias-corrected estimate is
    unbiased: t is `updates` where age is kept per entry, else the optimizer's own step count.
    Moments that are never bias-corrected start at the mean. A parameter that was never stepped
    has no state: nothing happens. 8-bit blocks of bitsandbytes are re-quantised. Statistics that
    average over `dim` (Adafactor's, SM3's of the other side) stay: what was dropped is their past.

    Args:
        optimizer: any optimizer, wrapped by accelerate or not; its own `move_state` has precedence.
        param: the trained values in their new shape; along `dim` it may be shorter than before.
        source: int64 (n,), the old slot of each new slot along `dim`, or -1 for a grown one.
        dim: the side along which slots moved.
        mean_grad: fp32, shape of param, mean gradient per update over the window; read where source
            is -1.
        mean_square: fp32, shape of param, mean squared gradient per update; None = zeros, as for
            mean_grad.
        updates: number of updates in the window that made the means.

    Raises:
        ValueError: source or means do not fit param, or the optimizer keeps state of an unknown
            layout.

    Paper: SpIEL, arXiv 2401.16405. Unlike its code, seeds are per update, not per micro-batch, and
    an age counts updates already applied.
    """
    dim %= max(1, param.dim())
    _check_fit(param, source, dim, mean_grad, mean_square, updates)
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, MovesOwnState):
        optimizer.move_state(param, source, mean_grad, mean_square, updates, dim=dim)
        return
    state: dict[str, Any] = optimizer.state.get(param, {})
    means = {key: mean_grad for key in _FIRST} | {key: mean_square for key in _SECOND}
    for key, value in list(state.items()):
        if not isinstance(value, Tensor) or key.startswith(_BLOCK_BOOKS):
            continue
        axis = _axis(optimizer, param, key, value, dim)
        if axis is not None:
            if key in _AVERAGED and bool((source < 0).any()):
                raise _unknown(optimizer, param, key, value)
            _move_(state, key, source, _seed(optimizer, param, key, means.get(key)), axis)


def moved(old: Tensor, source: Tensor, grown: Tensor | None = None, dim: int = 0) -> Tensor:
    """Return new[j] = old[source[j]] along `dim`, or grown[j] where source[j] is -1.

    Args:
        old: any dtype.
        source: int64 (n,), see `move_state`.
        grown: entries of the result's shape; None = zeros.
        dim: side of `old` that source indexes.

    Raises:
        ValueError: source names a slot that `old` does not have.
    """
    source, size = source.to(old.device), old.shape[dim]
    if source.numel() and int(source.max()) >= size:
        raise _outside(source, size)
    if not size:  # everything grows
        kept = old.new_zeros(_resized(old.shape, dim, source.numel()))
    else:
        kept = old.index_select(dim, source.clamp(min=0))
    if bool((source >= 0).all()):
        return kept
    fresh = torch.zeros_like(kept) if grown is None else grown.to(kept).reshape(kept.shape)
    along = [-1 if axis == dim else 1 for axis in range(old.dim())]
    return torch.where((source < 0).view(along), fresh, kept)


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that holds the state, without the wrappers around it."""
    while not isinstance(optimizer, MovesOwnState):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            break
        optimizer = inner
    return optimizer


_FIRST = ("exp_avg", "state1")
_SECOND = ("exp_avg_sq", "square_avg", "state2")
# statistics of factored second moments, by the side of the parameter they average over
_AVERAGED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}
_BLOCK_BOOKS = ("qmap", "absmax")  # of bitsandbytes, moved together with their state1 or state2


def _axis(
    optimizer: torch.optim.Optimizer, param: Tensor, key: str, value: Tensor, dim: int
) -> int | None:
    """Return the side of a state tensor that runs along side `dim` of its parameter, if any."""
    if key in _AVERAGED and param.dim() > 1:
        averaged = _AVERAGED[key] % param.dim()
        gone = value.dim() < param.dim()
        return None if averaged == dim else dim - (gone and averaged < dim)
    if value.dim() == 0 or (value.numel() == 1 and param.numel() > 1):
        return None
    if _resized(value.shape, dim, 0) == _resized(param.shape, dim, 0):
        return dim
    raise _unknown(optimizer, param, key, value)


def _resized(shape: torch.Size, dim: int, size: int) -> tuple[int, ...]:
    return tuple(size if axis == dim else old for axis, old in enumerate(shape))


def _unknown(
    optimizer: torch.optim.Optimizer, param: Tensor, key: str, value: Tensor
) -> ValueError:
    return ValueError(
        f"optimizer: got {type(optimizer).__name__} with state {key!r} of shape "
        f"{tuple(value.shape)} for a parameter of shape {tuple(param.shape)}, "
        "reselection can move state of the parameter's shape; use optimizer: auto"
    )


def _outside(source: Tensor, size: int) -> ValueError:
    return ValueError(
        f"source: got {source.dtype} outside of the parameter, allowed is int64 in [-1, {size}); "
        "use -1 for a grown entry"
    )


def _seed(
    optimizer: torch.optim.Optimizer, param: Tensor, key: str, mean: Tensor | None
) -> Tensor | None:
    """Return the moment a grown entry starts from, or None for zero."""
    # state1 and state2 of bitsandbytes are Adam's moments only in its Adam; Lion's state1 is not.
    if mean is None or (key.startswith("state") and _bnb_name(optimizer) != "adam"):
        return None
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    if "betas" not in group or "step" not in optimizer.state[param]:
        return mean
    beta = group["betas"][0 if key in _FIRST else 1]
    return mean * float(1 - beta ** float(optimizer.state[param]["step"]))


def _bnb_name(optimizer: torch.optim.Optimizer) -> str | None:
    return getattr(optimizer, "optimizer_name", None)


def _move_(
    state: dict[str, Any], key: str, source: Tensor, grown: Tensor | None, axis: int
) -> None:
    books = key.replace("state", "absmax")
    absmax = state.get(books) if key.startswith("state") else None
    if absmax is None:
        _put_(state, key, moved(state[key], source, grown, axis))
        return
    code_map = state[key.replace("state", "qmap")]
    values = moved(dequantised(state[key], absmax, code_map), source, grown, axis)
    if values.shape != state[key].shape:
        state[key] = torch.zeros_like(values, dtype=torch.uint8)
        state[books] = absmax.new_zeros(-(-values.numel() // BLOCK))
    requantise_(state[key], state[books], code_map, values)


def _put_(state: dict[str, Any], key: str, value: Tensor) -> None:
    """Assign in place where the shape stays: others may hold the tensor."""
    if state[key].shape == value.shape:
        state[key].copy_(value)
    else:
        state[key] = value


def _check_fit(
    param: Tensor,
    source: Tensor,
    dim: int,
    mean_grad: Tensor | None,
    mean_square: Tensor | None,
    updates: int,
) -> None:
    wanted = {"source": (source, param.shape[dim : dim + 1])}
    wanted |= {
        name: (mean, param.shape)
        for name, mean in {"mean_grad": mean_grad, "mean_square": mean_square}.items()
        if mean is not None
    }
    for name, (value, shape) in wanted.items():
        if value.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, allowed is {tuple(shape)}, as the "
                "parameter's; pass the new slots in order"
            )
    if source.dtype != torch.int64 or (source.numel() and int(source.min()) < -1):
        raise _outside(source, param.shape[dim])
    if updates < 0:
        raise ValueError(f"updates: got {updates}, allowed is >= 0; count the window's updates")
