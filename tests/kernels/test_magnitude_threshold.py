"""The threshold of a magnitude mask: exact, whatever the dtype, ties and signs."""

from __future__ import annotations

import math

import pytest
import torch

from sft.kernels.magnitude_threshold import (
    magnitude_threshold,
    magnitude_threshold_reference,
    magnitude_thresholds,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def drawn(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (50, 41)], ids=str)
def test_it_is_the_kth_magnitude(dtype, share, shape) -> None:
    # M2
    weight = drawn(*shape, dtype=dtype)
    found = magnitude_threshold(weight, share)
    assert found == magnitude_threshold_reference(weight, share)
    kept = int((weight.abs() <= found).sum())
    assert kept >= math.ceil(share * weight.numel())
    assert int((weight.abs() < found).sum()) < math.ceil(share * weight.numel())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_it_agrees_with_torch_on_a_large_tensor(dtype) -> None:
    weight = drawn(1700, 1300, dtype=dtype)  # several pieces
    wanted = math.ceil(0.3 * weight.numel())
    assert magnitude_threshold(weight, 0.3) == weight.abs().flatten().kthvalue(wanted).values.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_signs_and_infinities_are_in_order(dtype) -> None:
    inf, small = math.inf, torch.finfo(dtype).smallest_normal
    weight = torch.tensor([-0.0, inf, -1.5, 0.0, 1.5, -inf, small, -3.0], dtype=dtype)
    expected = [0.0, 0.0, small, 1.5, 1.5, 3.0, inf, inf]
    assert [magnitude_threshold(weight, (i + 1) / 8) for i in range(8)] == expected


def test_the_layout_does_not_matter() -> None:
    weight = drawn(30, 40)
    assert magnitude_threshold(weight.t()[::2], 0.4) == magnitude_threshold(
        weight.t()[::2].contiguous(), 0.4
    )


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(share) -> None:
    with pytest.raises(ValueError, match=r"share: got .* allowed is \(0, 1\]"):
        magnitude_threshold(drawn(4), share)


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="of 0 weights"):
        magnitude_threshold(torch.empty(0), 0.5)


def test_many_tensors_have_the_threshold_of_each() -> None:
    weights = [drawn(7), drawn(50, 41, dtype=torch.bfloat16).t(), drawn(1, dtype=torch.float64)]
    expected = [magnitude_threshold_reference(weight, 0.4) for weight in weights]
    assert magnitude_thresholds(weights, 0.4).tolist() == expected
    assert magnitude_thresholds([], 0.4).shape == (0,)
