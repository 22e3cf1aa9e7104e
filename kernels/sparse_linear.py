"""Linear layers whose weight is trained at some positions only: a partial backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.delta_product import delta_product
from sft.kernels.kept import Kept, form_of, restore
from sft.kernels.outer import DenseOuter, Outer, SharedInput, shared_input, token_last
from sft.kernels.outer_at import uses_sampled
from sft.kernels.pattern import Pattern

Tap = Callable[[Outer], None]


class Site(Protocol):
    """Where a layer's trained values lie, as backward needs to know it."""

    @property
    def pattern(self) -> Pattern:
        """The trained positions of the stored weight."""

    @property
    def tap(self) -> Tap | None:
        """Called in backward with the gradient not yet multiplied out, or None."""

    @property
    def stamp(self) -> object:
        """Names the content of the weight and of the pattern; equal stamps, equal content."""


def resident_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    site: Site,
    *,
    conv1d: bool,
    saved_inputs: str = "full",
) -> Tensor:
    """Apply a linear layer whose `weight` already holds the effective weight.

    y = x W^T + b with W.flat[idx] = w0 + values; forward is one plain GEMM. Backward returns
    dx = g W, dvalues = (g^T x)[idx], db = sum g, and never forms the dense weight gradient. Only x
    is saved, and nothing of x when no trained value needs it.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), or (in, out) with `conv1d` (GPT-2's layout, y = x W + b).
        bias: (out,) or None.
        values: (k,) the trained deltas: read in backward alone, for their dtype.
        site: positions, gradient tap and content stamp of the layer.
        conv1d: the weight is stored transposed.
        saved_inputs: in which form x is saved; see `sft.kernels.kept`.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.

    Raises:
        RuntimeError: in backward, when the weight's content is not what forward multiplied with.
    """
    original = x
    x, bias = as_autocast(x), as_autocast(bias)
    shared, form = announced(original, x.dtype, values), form_of(x, values, saved_inputs)
    y: Tensor = _ResidentLinear.apply(x, weight, bias, values, site, shared, form, conv1d)  # type: ignore[no-untyped-call]
    return y


def delta_linear(
    x: Tensor, values: Tensor, site: Site, *, conv1d: bool, saved_inputs: str = "full"
) -> Tensor:
    """Return the contribution of the deltas alone, x Delta^T, for a weight that cannot be written.

    Args:
        x: (..., in), any float dtype; the product is taken in float32 or wider.
        values: (k,) the trained deltas.
        site: as for `resident_linear`.
        conv1d: positions refer to a weight stored as (in, out).
        saved_inputs: in which form x is saved; see `sft.kernels.kept`.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.
    """
    original = x
    x = as_autocast(x)
    shared, form = announced(original, x.dtype, values), form_of(x, values, saved_inputs)
    y: Tensor = _DeltaLinear.apply(x, values, site, shared, form, conv1d)  # type: ignore[no-untyped-call]
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, conv1d: bool) -> Tensor:
    """Apply a frozen layer exactly as torch (nn.Linear) or transformers (Conv1D) does."""
    if not conv1d:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


class _ResidentLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        site: Site,
        shared: SharedInput,
        form: str,
        conv1d: bool,
    ) -> Tensor:
        needs_x = ctx.needs_input_grad[0]
        kept = shared.keep(x, form) if ctx.needs_input_grad[3] else (None, None)
        ctx.save_for_backward(*kept, weight if needs_x else None, values)
        ctx.site, ctx.stamp, ctx.conv1d = site, stamp_of(site), conv1d
        ctx.shared = shared
        return linear(x, weight.to(x.dtype), bias, conv1d=conv1d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_stamp(ctx)
        codes, peaks, weight, values = ctx.saved_tensors
        dx = dvalues = dbias = None
        if weight is not None:
            weight = weight.to(grad.dtype)
            dx = grad @ (weight.t() if ctx.conv1d else weight)
        if codes is not None:
            dvalues = values_gradient(ctx, Kept(codes, peaks), grad).to(values.dtype)
        if ctx.needs_input_grad[2]:
            dbias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return dx, None, dbias, dvalues, None, None, None, None


class _DeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        site: Site,
        shared: SharedInput,
        form: str,
        conv1d: bool,
    ) -> Tensor:
        kept = shared.keep(x, form) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*kept, values)
        ctx.site, ctx.stamp, ctx.conv1d = site, stamp_of(site), conv1d
        ctx.shared = shared
        return delta_product(x, values, site.pattern, to_rows=not conv1d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_stamp(ctx)
        codes, peaks, values = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = delta_product(grad, values, ctx.site.pattern, to_rows=ctx.conv1d)
        if codes is not None:
            dvalues = values_gradient(ctx, Kept(codes, peaks), grad).to(values.dtype)
        return dx, dvalues, None, None, None, None


def stamp_of(site: Any) -> object:
    """Return what names the content of a layer now; None in a graph that is being compiled.

    A stamp changes with each update, and a graph that had read one would be compiled anew after
    each. So a compiled backward does not check; the trainer writes weights between steps alone.
    """
    return None if torch.compiler.is_compiling() else site.stamp


def check_stamp(ctx: Any) -> None:
    """Raise when the layer's content is not what the forward of `ctx` saw."""
    if ctx.stamp is not None and ctx.stamp != ctx.site.stamp:
        raise RuntimeError(
            "backward: the sparse weight changed since this forward (an optimizer step, an adapter "
            "switch or a merge came between); run forward again before backward"
        )


def announced(x: Tensor, dtype: torch.dtype, values: Tensor) -> SharedInput:
    """Announce a reader of x, if a backward will come: a function can't tell in its forward.

    Args:
        x: the input as it was given, before any cast.
        dtype: what the reader computes in.
        values: the trained values.
    """
    if not (torch.is_grad_enabled() and values.requires_grad):
        return SharedInput()
    # a compiled graph keeps what it was traced with: it would go on reading an input of long ago
    if torch.compiler.is_compiling():
        return SharedInput()
    shared = shared_input(x, dtype)
    shared.announce()
    return shared


def values_gradient(ctx: Any, kept: Kept, grad: Tensor) -> Tensor:
    """Return the gradient of the deltas, (k,) float32 or wider; feed the tap, if there is one.

    Args:
        ctx: of a custom function, with `site`, `shared` and `conv1d`.
        kept: the input, (..., in).
        grad: (..., out).
    """
    site: Site = ctx.site
    grad = grad.reshape(-1, grad.shape[-1])
    # compiled, nothing is shared with graphs or layers beyond: the op turns its operands itself
    if torch.compiler.is_compiling() or not uses_sampled(site.pattern, grad.device):
        x = restore(kept, grad.dtype)
        x = x.reshape(-1, x.shape[-1])
    else:
        x = ctx.shared.take(kept, grad.dtype)
        # read twice if there is a tap: both reads share one transposition
        grad = grad if site.tap is None else token_last(grad)
    outer = DenseOuter(x, grad) if ctx.conv1d else DenseOuter(grad, x)
    with without_autocast(x):
        if site.tap is not None:
            site.tap(outer)
        return outer.at(site.pattern)


def as_autocast(tensor: Tensor | None) -> Any:
    """Cast as torch's autocast would: inside a custom function it does not cast by itself."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Keep sums in float32 or wider where autocast would take them in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, pattern: Pattern
) -> Tensor:
    """Oracle of both layers: y = x (W0 + scatter(values))^T + b, differentiable, dense."""
    delta = torch.zeros(weight.numel(), dtype=values.dtype)
    delta = delta.index_put((pattern.indices.long(),), values).view_as(weight)
    return F.linear(x, weight + delta, bias)
