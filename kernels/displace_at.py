"""Single weights of a displaced tensor: what a support trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.cpu.displace import coefficient
from sft.kernels.displace import displace_reference
from sft.kernels.library import define
from sft.kernels.mask import Mask, coded, decoded, mask_at
from sft.kernels.noise import check_kind, noise_at, signed


@torch.no_grad()
def displace_at(
    weight: Tensor,
    positions: Tensor,
    parameter: int,
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    mask: Mask | None = None,
) -> Tensor:
    """Return weights of a displaced tensor, bit for bit `displace(weight)[positions]`.

    Args:
        weight: any shape, layout and float dtype of 16 bits or more.
        positions: flat indices, any shape, int32 or int64.
        parameter: the number of the weight, 32 bits.
        draws: (key, c) of each direction.
        kind: of the noise, one of `KINDS`.
        mask: which part of the weight moves.

    Returns:
        of the shape of `positions`, in the dtype of `weight`; nothing of the weight's size is made.

    Paper: Sparse MeZO, arXiv 2402.15751, with a support that is known by its positions.
    """
    check_kind(kind)
    (chosen,), (mask_key,), (limit,) = coded([mask])
    keys, coefficients = [signed(key) for key, _ in draws], [float(c) for _, c in draws]
    found: Tensor = DISPLACE_AT(
        weight, positions, parameter, chosen, mask_key, limit, keys, coefficients, kind
    )
    return found


def _displace_at(
    weight: Tensor,
    positions: Tensor,
    parameter: int,
    mask: int,
    mask_key: int,
    limit: float,
    keys: list[int],
    coefficients: list[float],
    kind: str,
) -> Tensor:
    stored = torch.take(weight.detach(), positions.long())
    wide = torch.promote_types(stored.dtype, torch.float32)
    total = torch.zeros(stored.shape, dtype=wide, device=stored.device)
    for key, c in zip(keys, coefficients, strict=True):
        if c := coefficient(c, kind, wide):
            total += noise_at(key, parameter, positions, kind=kind).to(wide) * c
    moved = (stored.to(wide) - total).to(stored.dtype)
    if (chosen := decoded(mask, mask_key, limit)) is None:
        return moved
    return torch.where(mask_at(stored, positions, parameter, chosen), moved, stored)


DISPLACE_AT = define(
    "displace_at(Tensor weight, Tensor positions, int parameter, int mask, int mask_key, "
    "float limit, int[] keys, float[] coefficients, str kind) -> Tensor",
    plain=_displace_at,
    triton="displace_at:displace_at",
    fake=lambda weight, positions, *rest: weight.new_empty(positions.shape),
)


def displace_at_reference(
    weight: Tensor,
    positions: Tensor,
    parameter: int,
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    mask: Mask | None = None,
) -> Tensor:
    """Oracle of `displace_at`: the whole displaced tensor, of which weights are taken."""
    whole = displace_reference(weight, parameter, draws, kind=kind, mask=mask)
    return whole.flatten()[positions.long()]
