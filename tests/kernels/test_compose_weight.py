from __future__ import annotations

from typing import Any

import pytest
import torch

from sft.kernels.compose_weight import compose_weight, compose_weight_reference

SIZES = [(1, 1, 1, 1), (5, 7, 2, 0), (40, 30, 3, 200), (4, 6, 2, 24)]


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("rows", "cols", "rank", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_dense_sum(make_pattern, dtype, rows, cols, rank, k, conv1d) -> None:
    torch.manual_seed(0)
    pattern, values = make_pattern(rows, cols, k), torch.randn(k).double().to(dtype)
    out_features, in_features = (cols, rows) if conv1d else (rows, cols)
    a, b = torch.randn(rank, in_features).to(dtype), torch.randn(out_features, rank).to(dtype)
    found = compose_weight(a, b, values, 0.5, pattern, conv1d=conv1d)
    wanted = compose_weight_reference(a, b, values, 0.5, pattern, conv1d=conv1d)
    assert found.shape == (rows, cols)
    torch.testing.assert_close(found, wanted.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-5,
                               atol=2e-2 if dtype.itemsize == 2 else 1e-6)  # fmt: skip


def test_it_is_written_where_asked_and_computed_in_that_type(make_pattern) -> None:
    pattern, values = make_pattern(5, 7, 9), torch.randn(9)
    a, b, scale = torch.randn(2, 7), torch.randn(5, 2), torch.tensor(0.3)
    out = torch.full((5, 7), torch.nan, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = compose_weight(a, b, values, scale, pattern, out=out)
    assert found is out
    exact = compose_weight_reference(a, b, values, scale.item(), pattern)
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)


def test_it_has_no_gradient(make_pattern) -> None:
    a, b = torch.randn(2, 7, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    values = torch.randn(9, requires_grad=True)
    assert not compose_weight(a, b, values, 1.0, make_pattern(5, 7, 9)).requires_grad


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_factors_are_loaded_by_128_bits(name: str, target: str) -> None:
    """Also of an odd number of columns; the entries' loop, which reads single ones, comes last."""
    pytest.importorskip("triton")
    from device_cases.compose_weight import BUILDS
    from without_gpu.audit import audit, loads
    from without_gpu.compiler import compiled_for

    with compiled_for(target) as kernels:
        BUILDS[name].launch()
    every: Any = [loads(loop) for loop in audit(kernels[0]).loops]
    assert any(wide == count > 0 for count, wide in every)
