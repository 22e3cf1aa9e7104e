"""Both gradients not yet multiplied out, against the dense gradients of autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sft.kernels.outer import DenseOuter, LookupOuter, aligned_tokens, token_last


@pytest.fixture(params=["dense", "lookup", "lookup of one row", "no tokens"])
def outer_and_gradient(request):
    torch.manual_seed(3)
    weight = torch.randn(11, 6, requires_grad=True)
    if request.param == "dense":
        x, grad = torch.randn(9, 6), torch.randn(9, 11)
        F.linear(x, weight).backward(grad)
        return DenseOuter(grad, x), weight.grad
    tokens = {"lookup": 9, "lookup of one row": 1, "no tokens": 0}[request.param]
    ids, grad = torch.randint(11, (tokens,)), torch.randn(tokens, 6)
    F.embedding(ids, weight).backward(grad)
    return LookupOuter(ids, grad, 11), weight.grad


@pytest.mark.parametrize("k", [0, 1, 17, 66])
def test_at_gathers_the_dense_gradient(outer_and_gradient, make_pattern, k) -> None:
    outer, gradient = outer_and_gradient
    pattern = make_pattern(11, 6, k)
    expected = gradient.flatten()[pattern.indices.long()]
    torch.testing.assert_close(outer.at(pattern), expected, rtol=1e-5, atol=1e-6)


def test_blocks_make_up_the_dense_gradient(outer_and_gradient) -> None:
    outer, gradient = outer_and_gradient
    assert outer.shape == (11, 6)
    got = torch.cat([outer.block(0, 4), outer.block(4, 5), outer.block(5, 11)])
    torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32(dtype, make_pattern) -> None:
    ones = torch.ones(1000, 2, dtype=dtype)  # a half-precision sum of ones stops at 256 or 2048
    ids, pattern = torch.zeros(1000, dtype=torch.int64), make_pattern(2, 2, 4)
    for outer in (DenseOuter(ones, ones), LookupOuter(ids, ones, 2)):
        assert outer.at(pattern).dtype == outer.block(0, 2).dtype == torch.float32
        assert outer.at(pattern)[0] == outer.block(0, 2)[0, 0] == 1000


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_tokens_lie_side_by_side_and_aligned_for_vectors(tokens) -> None:
    there = token_last(torch.empty(tokens, 5, dtype=torch.bfloat16, device="meta"))
    held = -(-tokens // 16) * 16
    assert (there.dtype, there.shape, there.stride()) == (torch.bfloat16, (tokens, 5), (1, held))
    tensor = torch.randn(tokens, 5)
    assert torch.equal(aligned_tokens(tensor), tensor)
    here = token_last(tensor.bfloat16())
    assert here.dtype == torch.float32
    assert here.t().is_contiguous()


def test_a_lookup_is_no_dense_gradient(largest_tensor, make_pattern) -> None:
    pattern = make_pattern(10_000, 8, 50)
    outer = LookupOuter(torch.randint(10_000, (20,)), torch.randn(20, 8), 10_000)
    row_pointers = 8 * 10_001
    assert largest_tensor(lambda: outer.at(pattern)) <= row_pointers < 4 * 10_000 * 8
