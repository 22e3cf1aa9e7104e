from __future__ import annotations

import pytest
import torch

from sft.kernels.bias_scales import bias_scales, bias_scales_reference, bias_tables


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.95, 0.999999), (0.99, 0.5)])
def test_equals_the_definition(betas: tuple[float, float], reference: bool) -> None:
    ages = torch.tensor([*range(1, 50), 999, 17_327, 17_328, 10**6, 2**31 - 1], dtype=torch.int32)
    expected = bias_scales_reference(ages, betas, reference)
    for found, wanted in zip(bias_scales(ages, betas, reference), expected, strict=True):
        # 1 ulp: below the settled age fp64 rounds once, above it c is 1 in fp32.
        torch.testing.assert_close(found.double(), wanted, rtol=1.2e-7, atol=0)


def test_long_tables_are_not_made() -> None:
    assert bias_tables((0.9, 0.999999), False, torch.device("cpu")) is None
    tables = bias_tables((0.9, 0.999), False, torch.device("cpu"))
    assert tables is not None
    assert len(tables[0]) == len(tables[1]) == 17323
