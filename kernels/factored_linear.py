"""Linear layers whose weight is a low-rank product plus a sparse matrix, never multiplied out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.delta_product import delta_product
from sft.kernels.kept import Kept, form_of, restore
from sft.kernels.outer import SharedInput, token_last
from sft.kernels.outer_at import uses_sampled
from sft.kernels.sparse_linear import (
    Site,
    announced,
    as_autocast,
    check_stamp,
    linear,
    stamp_of,
    values_gradient,
)

Scale = float | Tensor

# How much slower than a dense GEMM one multiplication with the sparse matrix runs. CPU: measured
# (torch's sparse products reach 7 to 11 of 65 GFLOP/s a core). Elsewhere: an estimate.
SPARSE_SLOWDOWN = {"cpu": 8}
SPARSE_SLOWDOWN_ELSEWHERE = 100
# The transpositions that sparse products need take as long as so many ranks more.
TURNING_RANKS = 30


def factored_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scale: Scale,
    site: Site,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    conv1d: bool = False,
    saved_inputs: str = "full",
) -> Tensor:
    """Apply c B A + S as it is factored, or beside a weight that holds S already.

        y = c (x A^T) B^T + x S^T + bias        S = scatter(values)
        y = c (x A^T) B^T + x W^T + bias        with `weight`, whose positions hold w0 + values

    Backward returns dx = c (g B) A + g S (or g W), dB = c g^T (x A^T), dA = c (g B)^T x, the
    gradient of the values at their positions alone, and dc. Saved are x and x A^T, apart from
    references.

    Args:
        x: (..., in), any float dtype.
        a: (r, in).
        b: (out, r).
        values: (k,) the sparse entries; with `weight` read for their dtype alone.
        scale: c, a number or a trained tensor of one entry.
        site: positions in the stored (out, in) weight, gradient tap and content stamp.
        weight: frozen, (out, in), or None.
        bias: (out,) or None.
        conv1d: positions and `weight` are stored as (in, out), as GPT-2 does.
        saved_inputs: in which form x is saved; see `sft.kernels.kept`.

    Returns:
        (..., out) in the dtype of x, or of the ambient autocast.

    Raises:
        RuntimeError: in backward, when `weight` is not what forward multiplied with.

    Paper: SLTrain, arXiv 2406.02214, which composes the dense weight instead.
    """
    original = x
    x, bias = as_autocast(x), as_autocast(bias)
    shared, form = announced(original, x.dtype, values), form_of(x, values, saved_inputs)
    y: Tensor = _Factored.apply(x, a, b, values, scale, weight, bias, site, shared, form, conv1d)  # type: ignore[no-untyped-call]
    return y


def factored_is_faster(
    shape: tuple[int, int], tokens: int, rank: int, entries: int, device: torch.device
) -> bool:
    """Tell whether the factors cost less than composing the dense weight.

    6 T ((r + t) (m + n) + s k) against 6 T m n + 8 m n r operations, with s the slowness of sparse
    products and t the cost of turning their operands. The rule reads shapes alone, never a timing,
    so that a resumed run takes the same path.

    Args:
        shape: (m, n) of the weight.
        tokens: T, rows of the input.
        rank: r.
        entries: k, of the sparse matrix.
        device: where the layer runs.
    """
    rows, cols = shape
    slowdown = SPARSE_SLOWDOWN.get(device.type, SPARSE_SLOWDOWN_ELSEWHERE)
    factored = 6 * tokens * ((rank + TURNING_RANKS) * (rows + cols) + slowdown * entries)
    return factored <= 6 * tokens * rows * cols + 8 * rows * cols * rank


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        values: Tensor,
        scale: Scale,
        weight: Tensor | None,
        bias: Tensor | None,
        site: Site,
        shared: SharedInput,
        form: str,
        conv1d: bool,
    ) -> Tensor:
        low = x @ a.to(x.dtype).t()
        if weight is not None:
            y = linear(x, weight.to(x.dtype), bias, conv1d=conv1d)
        else:
            y = delta_product(x, values, site.pattern, to_rows=not conv1d).contiguous()
            y = y if bias is None else y.add_(bias)
        flat = y.view(-1, y.shape[-1])
        flat.addmm_((low * scale).view(-1, low.shape[-1]).to(y.dtype), b.to(y.dtype).t())
        needs, trained = ctx.needs_input_grad, scale if isinstance(scale, Tensor) else None
        kept = shared.keep(x, form) if needs[1] or needs[3] else (None, None)
        ranks = low if needs[2] or needs[4] else None
        ctx.save_for_backward(*kept, ranks, a, b, values, weight, trained)
        ctx.site, ctx.stamp, ctx.shared, ctx.conv1d = site, stamp_of(site), shared, conv1d
        ctx.scale = scale if trained is None else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_stamp(ctx)
        codes, peaks, low, a, b, values, weight, trained = ctx.saved_tensors
        needs, scale = ctx.needs_input_grad, ctx.scale if trained is None else trained
        flat = _rows(grad)
        if weight is None and uses_sampled(ctx.site.pattern, grad.device):
            # read by two sparse products: both share one transposition
            flat = token_last(flat).to(flat.dtype)
        back = flat @ b.to(flat.dtype)
        scaled = (back * scale).to(flat.dtype)
        dx = da = db = dvalues = dscale = dbias = None
        if needs[0]:
            dx = _input_gradient(ctx, flat, values, weight)
            dx = dx.addmm_(scaled, a.to(flat.dtype)).view(*grad.shape[:-1], a.shape[1])
        if codes is not None:
            x = restore(Kept(codes, peaks), flat.dtype)
        if needs[1]:
            da = (scaled.t() @ _rows(x)).to(a.dtype)
        if needs[2]:
            db = (flat.t() @ (_rows(low) * scale).to(flat.dtype)).to(b.dtype)
        if needs[3]:
            dvalues = values_gradient(ctx, Kept(x, None), flat).to(values.dtype)
        if trained is not None and needs[4]:
            dscale = (back * _rows(low)).sum(dtype=trained.dtype).view_as(trained)
        if needs[6]:
            dbias = flat.sum(0)
        return dx, da, db, dvalues, dscale, None, dbias, None, None, None, None


def _input_gradient(ctx: Any, grad: Tensor, values: Tensor, weight: Tensor | None) -> Tensor:
    """Return g W, or g S where there is no weight: (tokens, in), a tensor of its own."""
    if weight is None:
        return delta_product(grad, values, ctx.site.pattern, to_rows=ctx.conv1d).contiguous()
    weight = weight.to(grad.dtype)
    return grad @ (weight.t() if ctx.conv1d else weight)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def factored_linear_reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scale: Scale,
    site: Site,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    conv1d: bool = False,
) -> Tensor:
    """Oracle: y = x (c B A + S)^T + bias, dense and differentiable (SLTrain, eq. of W).

    With `weight` its entries at the positions are replaced by themselves plus 0 * values, so that
    the gradient of the values is that of the weight there.
    """
    rows, cols = site.pattern.shape
    entries = values
    if weight is not None:
        entries = values - values.detach()
    sparse = torch.zeros(rows * cols, dtype=values.dtype)
    sparse = sparse.index_put((site.pattern.indices.long(),), entries).view(rows, cols)
    stored = sparse if weight is None else weight + sparse
    dense = stored.t() if conv1d else stored
    return F.linear(x, dense + scale * (b @ a), bias)
