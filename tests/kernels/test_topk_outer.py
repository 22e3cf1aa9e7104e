from __future__ import annotations

import pytest
import torch

from sft.kernels import outer_at
from sft.kernels.outer import DenseOuter, LookupOuter
from sft.kernels.topk_outer import topk_outer, topk_outer_reference


@pytest.fixture(params=["one block", "a row a block", "blocks of five rows"])
def blocks(request, monkeypatch) -> None:
    size = {"one block": 2**20, "a row a block": 1, "blocks of five rows": 5 * 9 * 4}
    monkeypatch.setattr(outer_at, "BLOCK_BYTES", size[request.param])


def outers() -> list:
    torch.manual_seed(5)
    ids = torch.randint(12, (8,))
    small = torch.randint(-2, 3, (2, 7, 12)).float()  # products of few levels: many ties
    return [
        DenseOuter(torch.randn(7, 12), torch.randn(7, 9)),
        DenseOuter(small[0], small[1, :, :9].contiguous()),
        DenseOuter(torch.randn(7, 12).bfloat16(), torch.randn(7, 9).bfloat16()),
        LookupOuter(ids, torch.randn(8, 9), 12),
    ]


@pytest.mark.parametrize("excluded", [None, 0, 1, 60, 108])
@pytest.mark.parametrize("k", [0, 1, 20, 108])
@pytest.mark.parametrize("which", range(4), ids=["floats", "ties", "bf16", "lookup"])
def test_fact15_equals_the_oracle(blocks, make_pattern, which, k, excluded) -> None:
    outer = outers()[which]
    exclude = None if excluded is None else make_pattern(12, 9, excluded)
    got = topk_outer(outer, k, exclude)
    assert torch.equal(got, topk_outer_reference(outer, k, exclude))
    assert got.numel() == min(k, 108 - (excluded or 0))
    if exclude is not None:
        assert not torch.isin(got, exclude.indices).any()


def test_one_block_lives_at_a_time(monkeypatch, largest_tensor) -> None:
    rows, cols = 256, 64
    monkeypatch.setattr(outer_at, "BLOCK_BYTES", 8 * cols * 4)
    outer = DenseOuter(torch.randn(4, rows), torch.randn(4, cols))
    # nonzero() gives int64 positions: twice the bytes of the block they are found in
    assert largest_tensor(lambda: topk_outer(outer, 50)) <= max(2 * 8 * cols * 4, 8 * 2 * 50)
