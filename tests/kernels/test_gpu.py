"""The same cases on a GPU, where there is one: values that the interpreter can't vouch for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from device_cases.base import Case, check, collected

CASES: dict[str, Case] = collected("CASES")
RUNS = [
    pytest.param(case, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
    for name, case in CASES.items()
    for dtype in case.dtypes
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_values(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_the_same_bits_each_time(case: Case, dtype: torch.dtype) -> None:
    from device_cases.base import moved, tensors

    results = []
    for _ in range(2):
        given = moved(tuple(case.make(dtype)), "cuda")
        results.append([t.cpu() for t in (*tensors(case.run(*given)), *tensors(given))])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))
