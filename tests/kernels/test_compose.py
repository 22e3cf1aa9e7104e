from __future__ import annotations

import pytest
import torch

from sft.kernels.compose import compose, compose_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("k", [0, 1, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(dtype: torch.dtype, k: int, reference: bool) -> None:
    torch.manual_seed(k)
    originals, values = (torch.randn(k) / 50).to(dtype), torch.randn(k) / 1000
    got = compose(originals, values, reference=reference)
    assert got.dtype == dtype
    assert torch.equal(got, compose_reference(originals, values, reference=reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_deltas_leave_every_bit(dtype: torch.dtype) -> None:
    originals = torch.randn(1000).to(dtype)
    assert torch.equal(compose(originals, torch.zeros(1000)), originals)


def test_the_two_roundings_differ() -> None:
    # 1 + 3 * 2^-9 = 1 + 1.5 ulp: rounding the sum once is not rounding the delta first
    originals = torch.tensor([1.0], dtype=torch.bfloat16)
    values = torch.tensor([2.0**-8 + 2.0**-18])
    once = compose(originals, values)
    twice = compose(originals, values, reference=True)
    assert (once.item(), twice.item()) == (1 + 2.0**-7, 1.0)
