"""Linear layers of which some inputs or outputs are trained: a backward over the slice alone."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.kept import Kept, form_of, restore
from sft.kernels.outer import SharedInput, shared_input
from sft.kernels.outer_at import wide_product, widen
from sft.kernels.sparse_linear import as_autocast, check_stamp, linear, stamp_of, without_autocast


class SliceSite(Protocol):
    """Where a layer's trained slice lies, as backward needs to know it."""

    @property
    def side(self) -> str:
        """'in': columns of the (out, in) weight, the input features. 'out': its rows."""

    @property
    def indices(self) -> Tensor:
        """(s,) int32 or int64, the trained features of that side, ascending."""

    @property
    def start(self) -> int | None:
        """The first of the indices if they follow one another without a gap, else None."""

    @property
    def stamp(self) -> object:
        """Names the content of the weight and of the slice; equal stamps, equal content."""


def resident_slice_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    site: SliceSite,
    *,
    conv1d: bool,
    saved_inputs: str = "full",
) -> Tensor:
    """Apply a linear layer whose `weight` already holds the effective weight.

    y = x W^T + b with W[:, idx] = w0 + values^T (side "in") or W[idx] = w0 + values (side "out");
    forward is one plain GEMM. Backward returns dx = g W, db = sum g, and with P = values

        dP = x[:, idx]^T g  (s, out)  side "in":  saves the s inputs it needs, a copy of T*s entries
        dP = g[:, idx]^T x  (s, in)   side "out": saves x

    and no gradient of W. Nothing of x is saved when the values need no gradient, or under no_grad.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), or (in, out) with `conv1d` (GPT-2's layout, y = x W + b).
        bias: (out,) or None.
        values: (s, out) or (s, in) the trained deltas: read for their dtype alone.
        site: side, indices and content stamp of the layer.
        conv1d: the weight is stored transposed.
        saved_inputs: in which form backward's part of x is saved; see `sft.kernels.kept`.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.

    Raises:
        RuntimeError: in backward, when the weight's content is not what forward multiplied with.

    Yang et al., S2FT, arXiv 2412.06289. Their released code saves all of x.
    """
    original = x
    x, bias = as_autocast(x), as_autocast(bias)
    if not torch.is_grad_enabled():
        # a function can't tell in its forward, and would copy its part of x for nothing
        return linear(x, weight.to(x.dtype), bias, conv1d=conv1d)
    shared, form = _saving(original, x, values, site, saved_inputs)
    y: Tensor = _ResidentSlice.apply(x, weight, bias, values, site, shared, form, conv1d)  # type: ignore[no-untyped-call]
    return y


def slice_linear(
    x: Tensor, values: Tensor, site: SliceSite, *, out_features: int, saved_inputs: str = "full"
) -> Tensor:
    """Return the contribution of the slice alone, for a weight that cannot be written.

    y = x[:, idx] P for side "in"; y[:, idx] = x P^T and 0 elsewhere for side "out". What is saved
    for backward is what `resident_slice_linear` saves.

    Args:
        x: (..., in), any float dtype; the product is taken in float32 or wider.
        values: (s, out) or (s, in) the trained deltas P.
        site: as for `resident_slice_linear`.
        out_features: number of outputs of the layer.
        saved_inputs: as for `resident_slice_linear`.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.
    """
    original, x = x, as_autocast(x)
    shared, form = _saving(original, x, values, site, saved_inputs)
    y: Tensor = _Slice.apply(x, values, site, shared, form, out_features)  # type: ignore[no-untyped-call]
    return y


class _ResidentSlice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        site: SliceSite,
        shared: SharedInput,
        form: str,
        conv1d: bool,
    ) -> Tensor:
        kept = shared.keep(_read(x, site), form) if ctx.needs_input_grad[3] else (None, None)
        ctx.save_for_backward(*kept, weight if ctx.needs_input_grad[0] else None)
        ctx.site, ctx.stamp, ctx.conv1d, ctx.dtype = site, stamp_of(site), conv1d, values.dtype
        ctx.shared = shared  # which lives as long as a reader
        return linear(x, weight.to(x.dtype), bias, conv1d=conv1d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_stamp(ctx)
        codes, peaks, weight = ctx.saved_tensors
        dx = dvalues = dbias = None
        if weight is not None:
            weight = weight.to(grad.dtype)
            dx = grad @ (weight.t() if ctx.conv1d else weight)
        if codes is not None:
            dvalues = _values_grad(Kept(codes, peaks), grad, ctx.site).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            dbias = _tokens(grad).sum(0)
        return dx, None, dbias, dvalues, None, None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        site: SliceSite,
        shared: SharedInput,
        form: str,
        out_features: int,
    ) -> Tensor:
        read = _read(x, site)
        kept = shared.keep(read, form) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*kept, values)
        ctx.site, ctx.stamp, ctx.in_features = site, stamp_of(site), x.shape[-1]
        ctx.shared = shared
        if site.side == "in":
            return _multiply(read, values)
        return _scatter(_multiply(read, values.t()), site, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_stamp(ctx)
        codes, peaks, values = ctx.saved_tensors
        site: SliceSite = ctx.site
        dx = dvalues = None
        if ctx.needs_input_grad[0] and site.side == "in":
            dx = _scatter(_multiply(grad, values.t()), site, ctx.in_features)
        elif ctx.needs_input_grad[0]:
            dx = _multiply(select(grad, site), values)
        if codes is not None:
            dvalues = _values_grad(Kept(codes, peaks), grad, site).to(values.dtype)
        return dx, dvalues, None, None, None, None


def select(tensor: Tensor, site: SliceSite) -> Tensor:
    """Return the trained features of (..., features): (..., s), always a copy.

    A view of s features would keep the storage of all of them alive until backward.
    """
    if site.start is not None:
        return tensor.narrow(-1, site.start, site.indices.numel()).clone(
            memory_format=torch.contiguous_format
        )
    return tensor.index_select(-1, site.indices)


def _read(x: Tensor, site: SliceSite) -> Tensor:
    """What backward needs of x."""
    return select(x, site) if site.side == "in" else x


def _saving(
    original: Tensor, x: Tensor, values: Tensor, site: SliceSite, wanted: str
) -> tuple[SharedInput, str]:
    """Return who shares what backward needs of x, and in which form it is kept.

    Args:
        original: the input as it was given, before any cast.
        x: the input.
        values: the trained values.
        site: what is read of x: all of it is read by many, a part is a copy of its own.
        wanted: the form asked for.
    """
    alone = site.side == "in" or torch.compiler.is_compiling()
    form = form_of(x, values, wanted, copied=site.side == "in")
    return SharedInput() if alone or form == "full" else shared_input(original, x.dtype), form


def _values_grad(kept: Kept, grad: Tensor, site: SliceSite) -> Tensor:
    """Gradient of the slice: (s, out) or (s, in), float32 or wider."""
    read = restore(kept, grad.dtype)
    left, right = (read, grad) if site.side == "in" else (select(grad, site), read)
    left, right = _tokens(left), _tokens(right)
    with without_autocast(left):
        return wide_product(left, right)


def _tokens(tensor: Tensor) -> Tensor:
    """Return (..., features) as (tokens, features), which may both be 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _multiply(x: Tensor, values: Tensor) -> Tensor:
    """Return x @ values, summed in float32 or wider and rounded once to the dtype of x."""
    with without_autocast(x):
        wide = widen(x)
        return (wide @ values.to(wide.dtype)).to(x.dtype)


def _scatter(part: Tensor, site: SliceSite, features: int) -> Tensor:
    """Return (..., features) that is zero but for the trained ones."""
    dense = part.new_zeros(*part.shape[:-1], features)
    return dense.index_copy_(-1, site.indices.long(), part)


def slice_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, site: SliceSite
) -> Tensor:
    """Oracle of both layers, dense and differentiable: S2FT, arXiv 2412.06289, delta = U V^T.

    y = x (W0 + U P)^T + b, the rows of the one-hot U^T naming the trained features; the weight is
    (out, in).
    """
    one_hot = torch.zeros(site.indices.numel(), x.shape[-1] if site.side == "in" else len(weight))
    for row, feature in enumerate(site.indices.tolist()):
        one_hot[row, feature] = 1
    one_hot = one_hot.to(values.dtype)
    delta = values.t() @ one_hot if site.side == "in" else one_hot.t() @ values
    y = x @ (weight + delta).t()
    return y if bias is None else y + bias
