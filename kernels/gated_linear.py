"""A frozen linear layer plus a low-rank product with a gate for each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.sparse_linear import as_autocast, linear


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    conv1d: bool,
    dropped: Tensor | None = None,
) -> Tensor:
    """Apply a frozen layer and a gated low-rank one: y = x W^T + bias + s (g o (x A^T)) B^T.

    The second product is added into the output of the first, in place; likewise in backward. Saved
    are x and u = x A^T, besides references. A gate at 0 has a gradient, its rows of A and columns
    of B have exactly none.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), or (in, out) with `conv1d` (GPT-2's layout, y = x W + b).
        bias: (out,) or None.
        a: (r, in), r >= 0; multiplied in the dtype of x.
        b: (out, r), likewise.
        gate: (r,), any float dtype, or None for 1.
        scale: s.
        conv1d: the weight is stored transposed.
        dropped: what A multiplies instead of x, such as x after dropout; W multiplies x.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.

    Paper: SoRA, arXiv 2311.11696, equation 4.
    """
    x, bias, dropped = as_autocast(x), as_autocast(bias), as_autocast(dropped)
    y: Tensor = _GatedLinear.apply(x, dropped, weight, bias, a, b, gate, scale, conv1d)  # type: ignore[no-untyped-call]
    return y


def gated_delta(x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """Return the low-rank contribution alone, s (g o (x A^T)) B^T; arguments of `gated_linear`.

    For a weight that can't be multiplied with here: a quantised or a sharded one.
    """
    y: Tensor = _GatedLinear.apply(as_autocast(x), None, None, None, a, b, gate, scale, False)  # type: ignore[no-untyped-call]
    return y


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        gate: Tensor | None,
        scale: float,
        conv1d: bool,
    ) -> Tensor:
        read = x if dropped is None else dropped
        # ranks first: BLAS is slow where the short side counts columns
        u = a.to(x.dtype) @ _flat(read).t()  # (r, T)
        gated, up = _gated(u, gate, scale).t(), b.to(x.dtype).t()
        if weight is None:
            y = gated @ up
        else:
            y = linear(_flat(x), weight.to(x.dtype), bias, conv1d=conv1d).addmm_(gated, up)
        needs = dict(zip(_INPUTS, ctx.needs_input_grad, strict=False))
        ctx.save_for_backward(
            read if needs["a"] else None,
            u if needs["b"] or needs["gate"] else None,
            weight if needs["x"] else None,
            a, b, gate,
        )  # fmt: skip
        ctx.needs, ctx.scale, ctx.conv1d = needs, scale, conv1d
        ctx.shape, ctx.apart = x.shape, dropped is not None
        return y.view(*x.shape[:-1], b.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, u, weight, a, b, gate = ctx.saved_tensors
        needs, scale = ctx.needs, ctx.scale
        flat = _flat(grad)
        dx = ddropped = da = db = dgate = None
        raw = b.to(flat.dtype).t() @ flat.t()  # (r, T), the gradient behind the gate
        du = _gated(raw, gate, scale)
        if weight is not None:
            weight = weight.to(flat.dtype)
            dx = flat @ (weight.t() if ctx.conv1d else weight)
        low = a.to(flat.dtype)
        if ctx.apart:
            ddropped = du.t() @ low if needs["dropped"] else None
        elif needs["x"]:
            dx = du.t() @ low if dx is None else dx.addmm_(du.t(), low)
        if read is not None:
            da = (du @ _flat(read)).to(a.dtype)
        if needs["b"]:
            db = (_gated(u, gate, scale) @ flat).t().to(b.dtype)
        if needs["gate"]:
            dgate = (raw.to(gate.dtype) * u.to(gate.dtype)).sum(1) * scale
        dbias = flat.sum(0) if needs["bias"] else None
        dx, ddropped = _shaped(dx, ctx.shape), _shaped(ddropped, ctx.shape)
        return dx, ddropped, None, dbias, da, db, dgate, None, None


_INPUTS = ("x", "dropped", "weight", "bias", "a", "b", "gate")


def _gated(u: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """Scale each rank of (r, T); the factor is taken in the gate's dtype."""
    return u * (scale if gate is None else (gate * scale).to(u.dtype).unsqueeze(1))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _shaped(tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if tensor is None else tensor.view(shape)


def gated_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    conv1d: bool,
    dropped: Tensor | None = None,
) -> Tensor:
    """Oracle of both layers: dense, one rank after another, differentiable."""
    read, y = (x if dropped is None else dropped), x @ (weight if conv1d else weight.t())
    for j in range(a.shape[0]):
        factor = scale if gate is None else scale * gate[j]
        y = y + factor * (read @ a[j]).unsqueeze(-1) * b[:, j]
    return y if bias is None else y + bias
