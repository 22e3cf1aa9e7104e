"""Cross-entropy over a vocabulary, from hidden states: the logits are never whole in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.sparse_linear import as_autocast

CHUNK_ENTRIES = 2**24  # of logits at a time: 64 MiB in float32


class Tail(NamedTuple):
    """What a model does to its logits: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    tail: Tail | None = None,
    rows: int | None = None,
) -> Tensor:
    """Return sum_i -log softmax(tail(W x_i + b))[t_i], a chunk of rows at a time.

    The gradient is made in forward, where a chunk's probabilities are at hand: backward scales it.
    So no product is made twice, and what is kept is the gradient, in the shapes of x, W and b, of
    those that need one.

    Args:
        x: (n, d), any float dtype; products are taken in it, or in the ambient autocast's.
        weight: (vocabulary, d).
        bias: (vocabulary,) or None.
        targets: (n,) int64, each in [0, vocabulary).
        tail: what follows the product; nothing by default.
        rows: how many rows a chunk has; by default so many that it has 2^24 logits.

    Returns:
        () float32, or float64 of float64 inputs; sums are taken in the same.

    Raises:
        ValueError: shapes do not fit, or `rows` is not positive.
    """
    _check_fit(x, weight, targets, rows)
    x, weight, bias = as_autocast(x), as_autocast(weight), as_autocast(bias)
    size = chunk_rows(weight.shape[0]) if rows is None else rows
    needed = tuple(
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)
    )
    with torch.autocast(x.device.type, enabled=False):
        total: Tensor = _Chunked.apply(x, weight, bias, targets, tail or Tail(), size, needed)  # type: ignore[no-untyped-call]
    return total


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of logits are made at a time: a rule of the vocabulary alone."""
    return max(1, CHUNK_ENTRIES // vocabulary)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, tail: Tail | None = None
) -> Tensor:
    """Return the same from whole logits, by torch's own cross-entropy."""
    return whole_cross_entropy(F.linear(x, weight, bias), targets, tail or Tail())


def whole_cross_entropy(logits: Tensor, targets: Tensor, tail: Tail) -> Tensor:
    """Return sum_i -log softmax(tail(logits_i))[t_i], summed in float32 or wider."""
    logits = apply_tail(logits, tail)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="sum")


def apply_tail(logits: Tensor, tail: Tail) -> Tensor:
    """Return what a model makes of its logits."""
    logits = logits if tail.scale == 1 else logits * tail.scale
    return logits if tail.softcap is None else torch.tanh(logits / tail.softcap) * tail.softcap


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tail: Tail,
        rows: int,
        needed: tuple[bool, ...],
    ) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if needed[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(x[part], weight, bias).to(wide)
            total += _to_gradient_(logits, targets[part], tail, needs_gradient=any(needed))
            if dx is not None:
                torch.mm(logits.to(weight.dtype), weight, out=dx[part])
            if dweight is not None:
                dweight.addmm_(logits.t(), x[part].to(wide))
            if dbias is not None:
                dbias += logits.sum(0)
            del logits  # before the next ones are made
        ctx.gradients = dx, _like(dweight, weight), _like(dbias, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = [None if g is None else g * grad.to(g.dtype) for g in ctx.gradients]
        return (*made, None, None, None, None)


def _like(made: Tensor | None, of: Tensor | None) -> Tensor | None:
    return None if made is None or of is None else made.to(of.dtype)


def _to_gradient_(logits: Tensor, targets: Tensor, tail: Tail, *, needs_gradient: bool) -> Tensor:
    """Return the sum over rows of the loss, and leave in `logits` its gradient.

    With z = tail(logits): loss = log sum exp z - z_t, d loss / dz = softmax(z) - onehot(t).
    """
    slope = _apply_tail_(logits, tail, needs_slope=needs_gradient)
    picked = targets.unsqueeze(1)
    wanted = logits.gather(1, picked)
    peak = logits.amax(1, keepdim=True)
    norm = logits.sub_(peak).exp_().sum(1, keepdim=True)
    loss = (norm.log() + peak - wanted).sum()
    if needs_gradient:
        logits.div_(norm).scatter_add_(1, picked, -torch.ones_like(wanted))
        if slope is not None:
            logits.mul_(slope)
        if tail.scale != 1:
            logits.mul_(tail.scale)
    return loss


def _apply_tail_(logits: Tensor, tail: Tail, *, needs_slope: bool) -> Tensor | None:
    """Apply the tail in place; return the derivative of the softcap where it is needed."""
    if tail.scale != 1:
        logits.mul_(tail.scale)
    if tail.softcap is None:
        return None
    logits.div_(tail.softcap).tanh_()
    slope = logits.square().neg_().add_(1) if needs_slope else None
    logits.mul_(tail.softcap)
    return slope


def _check_fit(x: Tensor, weight: Tensor, targets: Tensor, rows: int | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)} for a weight of {tuple(weight.shape)}, allowed is "
            "(n, d) for (vocabulary, d); flatten x to rows"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)}, allowed is {tuple(x.shape[:1])}; "
            "give a target for each row of x"
        )
    if rows is not None and rows < 1:
        raise ValueError(f"rows: got {rows}, allowed is 1 or more; leave it out for the default")
