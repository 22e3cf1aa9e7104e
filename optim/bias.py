"""Adam's bias correction for entries of different ages, looked up instead of computed."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def bias_scales(
    age: Tensor, betas: tuple[float, float], reference: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what to multiply m and sqrt(v) by: (1 / c1, 1 / sqrt(c2)), with c = 1 - beta^age.

    With `reference` (sqrt(c2) / c1, 1): both corrections on m, as eps is not corrected.

    Args:
        age: int32, any shape, contiguous, >= 1.
        betas: decay rates, each in [0, 1).
        reference: see above.

    Returns:
        Two new fp32 tensors of age's shape, correctly rounded from fp64.
    """
    last = _settled_age(max(betas))
    if last > _TABLE_ENTRIES:
        m_scale, root_scale = _scales(age, betas, reference)
        return m_scale, root_scale
    at = age.clamp(max=last).view(-1)
    m_table, root_table = _tables(last, *betas, reference, age.device)
    return (
        m_table.index_select(0, at).view(age.shape),
        root_table.index_select(0, at).view(age.shape),
    )


_TABLE_ENTRIES = 1 << 20  # betas above about 0.99998 are computed entry by entry instead


def _settled_age(beta: float) -> int:
    """Return the age from which 1 - beta^age is 1 in fp32: beta^age < 2^-25."""
    return 1 if beta == 0 else math.ceil(-25 * math.log(2) / math.log(beta)) + 1


@lru_cache(maxsize=16)
def _tables(
    last: int, beta1: float, beta2: float, reference: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    ages = torch.arange(last + 1, device="cpu").clamp(min=1)
    m_table, root_table = _scales(ages, (beta1, beta2), reference)
    return m_table.to(device), root_table.to(device)


def _scales(age: Tensor, betas: tuple[float, float], reference: bool) -> tuple[Tensor, Tensor]:
    c1, c2 = (1 - torch.pow(beta, age.double()) for beta in betas)
    if reference:
        return (c2.sqrt() / c1).float(), torch.ones_like(c2, dtype=torch.float32)
    return c1.reciprocal().float(), c2.rsqrt().float()
