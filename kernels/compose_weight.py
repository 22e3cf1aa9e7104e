"""A low-rank product plus a sparse matrix as one dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.library import define
from sft.kernels.pattern import Pattern

# Side of a GPU's tiles: of 128 the sparse part would take all registers.
SIDE = 64


def compose_weight(
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scale: float | Tensor,
    pattern: Pattern,
    *,
    conv1d: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return c B A + S in the stored shape of the weight, without gradient.

    Args:
        a: (r, in).
        b: (out, r).
        values: (k,) the sparse entries.
        scale: c.
        pattern: their positions in the stored shape.
        conv1d: the stored shape is (in, out).
        out: where to write, contiguous; its dtype is computed in. By default a new tensor in the
            dtype of `a`.

    Paper: SLTrain, arXiv 2406.02214. Their code multiplies, then scatters atomically in a second
    pass; positions are unique, so a plain indexed add is enough, and a GPU needs no second pass.
    """
    if out is None:
        out = a.new_empty(pattern.shape)
    first, second = (a.t(), b.t()) if conv1d else (b, a)
    tiles = pattern.tiles(SIDE) if out.device.type != "cpu" else (pattern.indices[:0],) * 2
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        left, right = (first * scale).to(out.dtype), second.to(out.dtype)
        COMPOSE(out, left, right, values, pattern.indices, *tiles, SIDE)
    return out


def in_two_passes(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    values: Tensor,
    indices: Tensor,
    order: Tensor,
    pointers: Tensor,
    side: int,
) -> None:
    """Write the product, then add the entries."""
    torch.mm(left, right, out=out)
    out.view(-1).index_add_(0, indices, values.to(out.dtype))


COMPOSE = define(
    "compose_(Tensor(a!) out, Tensor left, Tensor right, Tensor values, Tensor indices, "
    "Tensor order, Tensor pointers, SymInt side) -> ()",
    plain=in_two_passes,
    triton="compose_weight:compose_",
    fake=lambda *_: None,
)


def compose_weight_reference(
    a: Tensor,
    b: Tensor,
    values: Tensor,
    scale: float | Tensor,
    pattern: Pattern,
    *,
    conv1d: bool = False,
) -> Tensor:
    """Oracle: dense and in float64 (SLTrain, eq. of W)."""
    sparse = torch.zeros(pattern.shape, dtype=torch.float64)
    sparse.view(-1)[pattern.indices.long()] = values.double()
    product = scale * (b.double() @ a.double())
    return sparse + (product.t() if conv1d else product)
