"""Moves optimizer state along when a reselection permutes, drops and grows the trained entries."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sft.optim.bnb_state import dequantised, requantise_


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
    ) -> None:
        """See the function `move_state`."""


def move_state(
    optimizer: torch.optim.Optimizer,
    param: Tensor,
    source: Tensor,
    *,
    mean_grad: Tensor | None = None,
    mean_square: Tensor | None = None,
    updates: int = 0,
) -> None:
    """Give every entry of `param` the optimizer state of the entry it was, or a seed.

    state'[j] = state[source[j]] where source[j] >= 0, bit for bit. Grown entries (-1) start at 0;
    Adam's moments start at mean * (1 - beta^t), so that the next bias-corrected estimate is
    unbiased: t is `updates` where age is kept per entry, else the optimizer's own step count.
    Moments that are never bias-corrected start at the mean. A parameter that was never stepped
    has no state: nothing happens. 8-bit blocks of bitsandbytes are re-quantised.

    Args:
        optimizer: any optimizer, wrapped by accelerate or not; its own `move_state` has precedence.
        param: the trained values, k entries.
        source: int64 (k,), the old slot of each new slot, or -1 for a freshly grown entry.
        mean_grad: fp32 (k,), mean gradient per update over the window; read where source is -1.
        mean_square: fp32 (k,), mean squared gradient per update; None = zeros, as for mean_grad.
        updates: number of updates in the window that made the means.

    Raises:
        ValueError: source or means do not fit param, or the optimizer keeps state of an unknown
            layout.

    Paper: SpIEL, arXiv 2401.16405. Unlike its code, seeds are per update, not per micro-batch, and
    an age counts updates already applied.
    """
    _check_fit(param, source, mean_grad, mean_square, updates)
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, MovesOwnState):
        optimizer.move_state(param, source, mean_grad, mean_square, updates)
        return
    state: dict[str, Any] = optimizer.state.get(param, {})
    means = {key: mean_grad for key in _FIRST} | {key: mean_square for key in _SECOND}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key.startswith(_BLOCK_BOOKS):
            continue
        if value.shape == param.shape:
            grown = _seed(optimizer, param, key, means.get(key))
            _move_(state, key, source, grown)
        elif value.numel() > 1:
            raise ValueError(
                f"optimizer: got {type(optimizer).__name__} with state {key!r} of shape "
                f"{tuple(value.shape)} for a parameter of shape {tuple(param.shape)}, "
                "reselection can move state of the parameter's shape; use optimizer: auto"
            )


def moved(old: Tensor, source: Tensor, grown: Tensor | None = None) -> Tensor:
    """Return new[j] = old[source[j]], or grown[j] where source[j] is -1; shape and dtype of old.

    Args:
        old: any shape of k entries, any dtype.
        source: int64 (k,), see `move_state`.
        grown: k entries; None = zeros.
    """
    source = source.to(old.device)
    kept = old.reshape(-1).index_select(0, source.clamp(min=0))
    fresh = torch.zeros_like(kept) if grown is None else grown.reshape(-1).to(kept)
    return torch.where(source < 0, fresh, kept).view(old.shape)


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
_BLOCK_BOOKS = ("qmap", "absmax")  # of bitsandbytes, moved together with their state1 or state2


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


def _move_(state: dict[str, Any], key: str, source: Tensor, grown: Tensor | None) -> None:
    absmax = state.get(key.replace("state", "absmax")) if key.startswith("state") else None
    if absmax is None:
        state[key].copy_(moved(state[key], source, grown))
        return
    code_map = state[key.replace("state", "qmap")]
    values = dequantised(state[key], absmax, code_map)
    requantise_(state[key], absmax, code_map, moved(values, source, grown))


def _check_fit(
    param: Tensor,
    source: Tensor,
    mean_grad: Tensor | None,
    mean_square: Tensor | None,
    updates: int,
) -> None:
    k = param.numel()
    for name, value in {
        "source": source,
        "mean_grad": mean_grad,
        "mean_square": mean_square,
    }.items():
        if value is not None and value.shape != (k,):
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, allowed is ({k},), one per entry of the "
                "parameter; pass the new slots in order"
            )
    if source.dtype != torch.int64 or (k and not -1 <= int(source.min()) <= int(source.max()) < k):
        raise ValueError(
            f"source: got {source.dtype} outside of the parameter, allowed is int64 in [-1, {k}); "
            "use -1 for a grown entry"
        )
    if updates < 0:
        raise ValueError(f"updates: got {updates}, allowed is >= 0; count the window's updates")
