"""The proximal operator of an l1 penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.library import define


def soft_threshold(value: Tensor, tau: float | Tensor) -> Tensor:
    """Return sign(v) max(|v| - tau, 0), the proximal operator of tau * norm1.

    Args:
        value: floating, any shape.
        tau: threshold >= 0; a tensor broadcasts.

    Returns:
        shape and dtype of value; exactly 0.0 where |v| <= tau.
    """
    # v - v is +0.0: no rounding and no negative zero inside the threshold
    return value - value.clamp(-tau, tau)  # type: ignore[arg-type]


def soft_threshold_many_(
    values: Sequence[Tensor], tau: float, factor: Tensor | None = None
) -> None:
    """Apply `soft_threshold` to tensors in place; on a GPU in one launch.

    Args:
        values: floating, any shapes.
        tau: threshold >= 0, the same for all.
        factor: one number that tau is multiplied by, such as 0 for an update that was skipped; a
            tensor on the device of the values is never waited for.
    """
    _soft_threshold_many_(list(values), tau, factor)


def soft_threshold_reference(value: Tensor, tau: float) -> Tensor:
    """Oracle of `soft_threshold`: one number after another; tau in the dtype of the values."""
    bound = torch.tensor(tau, dtype=value.dtype).item()
    shrunk = [
        0.0 if abs(v) <= bound else v - bound if v > 0 else v + bound
        for v in value.flatten().double().tolist()
    ]
    return torch.tensor(shrunk, dtype=torch.float64).to(value.dtype).view(value.shape)


def shrink_many_(values: Sequence[Tensor], tau: float, factor: Tensor | None) -> None:
    """Do what `soft_threshold_many_` does in torch."""
    if factor is None:
        inside = torch._foreach_clamp_min(list(values), -tau)
        torch._foreach_clamp_max_(inside, tau)
        torch._foreach_sub_(list(values), inside)
        return
    for value in values:
        # 0-dimensional values would take the dtype of the factor
        value.copy_(soft_threshold(value, (factor * tau).to(value.dtype)))


_soft_threshold_many_ = define(
    "soft_threshold_many_(Tensor(a!)[] values, float tau, Tensor? factor) -> ()",
    plain=shrink_many_,
    triton="soft_threshold:soft_threshold_many_",
    fake=lambda *_: None,
)
