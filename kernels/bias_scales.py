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
    tables = bias_tables(betas, reference, age.device)
    if tables is None:
        return _scales(age, betas, reference)
    m_table, root_table = tables
    at = age.clamp(max=len(m_table) - 1).view(-1)
    return (
        m_table.index_select(0, at).view(age.shape),
        root_table.index_select(0, at).view(age.shape),
    )


def bias_tables(
    betas: tuple[float, float], reference: bool, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return both scales by age, fp32; ages past the last entry have its scales.

    None where the tables would be long: for betas above about 0.99998.
    """
    last = _settled_age(max(betas))
    return _tables(last, *betas, reference, device) if last <= _TABLE_ENTRIES else None


def bias_scales_reference(
    age: Tensor, betas: tuple[float, float], reference: bool = False
) -> tuple[Tensor, Tensor]:
    """Oracle of `bias_scales`: the definition, in float64, one age after another."""
    pairs = []
    for a in age.view(-1).tolist():
        c1, c2 = 1 - betas[0] ** a, 1 - betas[1] ** a
        pairs.append((math.sqrt(c2) / c1, 1.0) if reference else (1 / c1, 1 / math.sqrt(c2)))
    scales = torch.tensor(pairs, dtype=torch.float64, device=age.device).view(-1, 2)
    return scales[:, 0].view(age.shape), scales[:, 1].view(age.shape)


_TABLE_ENTRIES = 1 << 20


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
