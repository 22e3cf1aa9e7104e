"""Rows of a displaced table: what an embedding looks up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.displace import Mask, displace, displace_reference


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

    A row that is not looked up has no part in the loss. Off the CPU the whole table is made, for a
    moment. Source: the memory-efficient form of Sparse MeZO, arXiv 2402.15751.
    """
    if weight.device.type != "cpu":
        # a whole table takes a device less time than a launch for each row
        return displace([weight], [parameter], draws, kind=kind, masks=[mask])[0][rows]
    found = weight.index_select(0, rows)
    count, width = found.shape
    starts = [row * width for row in rows.tolist()]
    parts = list(found)
    displace(
        parts,
        [parameter] * count,
        draws,
        kind=kind,
        masks=[mask] * count,
        out=parts,
        starts=starts,
    )
    return found


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
