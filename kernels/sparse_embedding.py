"""Embeddings whose table is trained at some positions only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.kernels.outer import LookupOuter
from sft.kernels.pattern import Pattern
from sft.kernels.sparse_linear import Site, check_stamp, stamp_of


def resident_embedding(
    ids: Tensor, weight: Tensor, values: Tensor, site: Site, padding_idx: int | None = None
) -> Tensor:
    """Look rows up in a table that already holds the effective weight.

    Backward returns the gradient at the trained positions; the table's dense gradient is never
    formed.

    Args:
        ids: (...) integer rows.
        weight: (rows, cols).
        values: (k,) the trained deltas.
        site: positions, gradient tap and content stamp.
        padding_idx: a row whose look-ups carry no gradient, as in `torch.nn.Embedding`.

    Returns:
        (..., cols) in the dtype of the table.
    """
    y: Tensor = _ResidentEmbedding.apply(ids, weight, values, site, padding_idx)  # type: ignore[no-untyped-call]
    return y


def delta_embedding(
    ids: Tensor, values: Tensor, site: Site, padding_idx: int | None = None
) -> Tensor:
    """Return the rows of the sparse delta table alone, for a table that cannot be written.

    Args:
        ids: (...) integer rows.
        values: (k,) the trained deltas.
        site: as for `resident_embedding`.
        padding_idx: a row whose look-ups carry no gradient.

    Returns:
        (..., cols) in the dtype of the values.
    """
    y: Tensor = _DeltaEmbedding.apply(ids, values, site, padding_idx)  # type: ignore[no-untyped-call]
    return y


class _ResidentEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, values: Tensor, site: Site, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, values)
        ctx.site, ctx.stamp, ctx.padding_idx = site, stamp_of(site), padding_idx
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _values_grad(ctx, grad), None, None


class _DeltaEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, values: Tensor, site: Site, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, values)
        ctx.site, ctx.stamp, ctx.padding_idx = site, stamp_of(site), padding_idx
        return _delta_rows(ids, values, site.pattern)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _values_grad(ctx, grad), None, None


def _values_grad(ctx: Any, grad: Tensor) -> Tensor:
    """Gradient of the deltas: (k,). Feeds the tap, if there is one."""
    check_stamp(ctx)
    ids, values = ctx.saved_tensors
    flat, grad = ids.flatten(), grad.reshape(-1, grad.shape[-1])
    if ctx.padding_idx is not None:
        kept = flat != ctx.padding_idx
        flat, grad = flat[kept], grad[kept]
    outer = LookupOuter(flat, grad, ctx.site.pattern.shape[0])
    if ctx.site.tap is not None:
        ctx.site.tap(outer)
    return outer.at(ctx.site.pattern).to(values.dtype)


def _delta_rows(ids: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Look up in a table of only the rows that `ids` names."""
    rows, slot = torch.unique(ids, return_inverse=True)
    owner = pattern.rows()
    place = torch.searchsorted(rows, owner).clamp_(max=max(0, rows.numel() - 1))
    used = (rows[place] == owner).nonzero().flatten() if rows.numel() else owner[:0]
    cols = pattern.shape[1]
    flat = place[used] * cols + pattern.columns.long()[used]
    table = values.new_zeros(rows.numel() * cols).index_put((flat,), values[used])
    return F.embedding(slot, table.view(-1, cols))


def embedding_reference(ids: Tensor, weight: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Oracle: rows of the dense table W0 + scatter(values), differentiable."""
    delta = torch.zeros(weight.numel(), dtype=values.dtype)
    delta = delta.index_put((pattern.indices.long(),), values).view_as(weight)
    return F.embedding(ids, weight + delta)
