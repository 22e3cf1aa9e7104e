"""Rows of a displaced table: what an embedding looks up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.displace import displace, displace_reference
from sft.kernels.library import define
from sft.kernels.mask import Mask, coded, decoded
from sft.kernels.noise import check_kind, signed


@torch.no_grad()
def displace_rows(
    weight: Tensor,
    rows: Tensor,
    parameter: int,
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    mask: Mask | None = None,
) -> Tensor:
    """Return rows of the displaced weight, bit for bit `displace(weight)[rows]`, and make no other.

    Args:
        weight: (n, d), any float dtype and layout.
        rows: (u,) integers in [0, n).
        parameter: the number of the weight, 32 bits.
        draws: (key, c) of each direction.
        kind: of the noise, one of `KINDS`.
        mask: which part of the weight moves.

    Returns:
        (u, d) in the dtype of `weight`.

    A row that is not looked up has no part in the loss. Source: the memory-efficient form of
    Sparse MeZO, arXiv 2402.15751.
    """
    check_kind(kind)
    (chosen,), (mask_key,), (limit,) = coded([mask])
    keys, coefficients = [signed(key) for key, _ in draws], [float(c) for _, c in draws]
    found: Tensor = DISPLACE_ROWS(
        weight, rows, parameter, chosen, mask_key, limit, keys, coefficients, kind
    )
    return found


def _displace_rows(
    weight: Tensor,
    rows: Tensor,
    parameter: int,
    mask: int,
    mask_key: int,
    limit: float,
    keys: list[int],
    coefficients: list[float],
    kind: str,
) -> Tensor:
    found = weight.index_select(0, rows).cpu()
    count, width = found.shape
    starts = [row * width for row in rows.tolist()]
    parts = list(found)
    displace(
        parts,
        [parameter] * count,
        list(zip(keys, coefficients, strict=True)),
        kind=kind,
        masks=[decoded(mask, mask_key, limit)] * count,
        out=parts,
        starts=starts,
    )
    return found.to(weight.device)


DISPLACE_ROWS = define(
    "displace_rows(Tensor weight, Tensor rows, int parameter, int mask, int mask_key, "
    "float limit, int[] keys, float[] coefficients, str kind) -> Tensor",
    plain=_displace_rows,
    triton="displace_at:displace_rows",
    fake=lambda weight, rows, *rest: weight.new_empty(rows.shape[0], weight.shape[1]),
)


def displace_rows_reference(
    weight: Tensor,
    rows: Tensor,
    parameter: int,
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    mask: Mask | None = None,
) -> Tensor:
    """Oracle of `displace_rows`: the whole displaced weight, of which rows are taken."""
    whole = displace_reference(weight, parameter, draws, kind=kind, mask=mask)
    return whole[rows]
