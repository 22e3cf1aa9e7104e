"""Linear layers whose weight is a low-rank product plus a sparse matrix, composed when needed."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.compose_weight import compose_weight
from sft.kernels.kept import Kept, form_of, keep, restore
from sft.kernels.outer import DenseOuter
from sft.kernels.pattern import Pattern
from sft.kernels.sparse_linear import (
    Site,
    as_autocast,
    check_stamp,
    linear,
    stamp_of,
)

Scale = float | Tensor


def composed_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scale: Scale,
    site: Site,
    *,
    bias: Tensor | None = None,
    conv1d: bool = False,
    saved_inputs: str = "full",
) -> Tensor:
    """Compose W = c B A + S in a workspace, apply it, and forget it until backward.

        y = x W^T + bias;  dx = g W;  dW = g^T x;  dB = c dW A^T;  dA = c B^T dW;  dvalues = dW[idx]

    Only x is saved, apart from references. All layers of a thread share one workspace, which holds
    W in forward, and in backward first W, then dW.

    Args:
        x: (..., in), any float dtype; W is composed in it.
        a: (r, in).
        b: (out, r).
        values: (k,) the sparse entries.
        scale: c, a number or a trained tensor of one entry.
        site: positions in the stored (out, in) weight, gradient tap and content stamp.
        bias: (out,) or None.
        conv1d: positions are those of a weight stored as (in, out).
        saved_inputs: in which form x is saved; see `sft.kernels.kept`.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.

    Paper: SLTrain, arXiv 2406.02214. Their code allocates W twice and dW once for each layer and
    step.
    """
    x, bias = as_autocast(x), as_autocast(bias)
    form = form_of(x, values, saved_inputs)
    y: Tensor = _Composed.apply(x, a, b, values, scale, bias, site, form, conv1d)  # type: ignore[no-untyped-call]
    return y


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        values: Tensor,
        scale: Scale,
        bias: Tensor | None,
        site: Site,
        form: str,
        conv1d: bool,
    ) -> Tensor:
        trained = scale if isinstance(scale, Tensor) else None
        kept = keep(x, form) if any(ctx.needs_input_grad[1:5]) else (None, None)
        ctx.save_for_backward(*kept, a, b, values, trained)
        ctx.site, ctx.stamp, ctx.conv1d = site, stamp_of(site), conv1d
        ctx.scale = scale if trained is None else None
        out = _workspace.take(site.pattern.shape, x)
        weight = compose_weight(a, b, values, scale, site.pattern, conv1d=conv1d, out=out)
        return linear(x, weight, bias, conv1d=conv1d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_stamp(ctx)
        codes, peaks, a, b, values, trained = ctx.saved_tensors
        needs, scale = ctx.needs_input_grad, ctx.scale if trained is None else trained
        pattern: Pattern = ctx.site.pattern
        out = _workspace.take(pattern.shape, grad)
        dx = dbias = None
        if needs[0]:
            weight = compose_weight(a, b, values, scale, pattern, conv1d=ctx.conv1d, out=out)
            dx = grad @ (weight.t() if ctx.conv1d else weight)
        if needs[5]:
            dbias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        if codes is None:
            return dx, None, None, None, None, dbias, None, None, None
        dweight = _weight_gradient(ctx, restore(Kept(codes, peaks), grad.dtype), grad, out)
        dvalues = dweight.view(-1).index_select(0, pattern.indices).to(values.dtype)
        # of the stored weight; the factors see it as (out, in)
        dweight = dweight.t() if ctx.conv1d else dweight
        turned = dweight @ a.to(grad.dtype).t()
        da = ((b * scale).to(grad.dtype).t() @ dweight).to(a.dtype)
        dscale = None
        if trained is not None:
            dscale = (turned * b).sum(dtype=trained.dtype).view_as(trained)
        return dx, da, (turned * scale).to(b.dtype), dvalues, dscale, dbias, None, None, None


def _weight_gradient(ctx: Any, x: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """Write the gradient of the stored weight to `out`; feed the tap, if there is one."""
    left, right = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if ctx.conv1d:
        left, right = right, left
    if ctx.site.tap is not None:
        ctx.site.tap(DenseOuter(left, right))
    return torch.mm(left.t(), right, out=out)


class _Workspace(threading.local):
    """One buffer for each thread, device and dtype, as large as the largest weight so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Return the buffer as a matrix of this shape, whatever it holds."""
        key, numel = (like.device, like.dtype), shape[0] * shape[1]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            # the old one is given back first
            self._buffers.pop(key, None)
            # what inference mode makes could never be written to outside of it
            with torch.inference_mode(False):
                buffer = torch.empty(numel, dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:numel].view(shape)


_workspace = _Workspace()


def composed_linear_reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scale: Scale,
    site: Site,
    *,
    bias: Tensor | None = None,
    conv1d: bool = False,
) -> Tensor:
    """Oracle: y = x (c B A + S)^T + bias, dense and differentiable (SLTrain, eq. of W)."""
    rows, cols = site.pattern.shape
    sparse = torch.zeros(rows * cols, dtype=values.dtype)
    sparse = sparse.index_put((site.pattern.indices.long(),), values).view(rows, cols)
    return F.linear(x, (sparse.t() if conv1d else sparse) + scale * (b @ a), bias)
