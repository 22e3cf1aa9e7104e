from __future__ import annotations

import pytest
import torch

from sft.kernels import outer_at
from sft.kernels import topk_outer as topk_module
from sft.kernels.outer import DenseOuter, LookupOuter
from sft.kernels.pattern import Pattern
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


def crowded() -> DenseOuter:
    """Whole numbers, hundreds of times larger in one corner."""
    generator = torch.Generator().manual_seed(6)
    left = torch.randint(-3, 4, (9, 150), generator=generator).float()
    right = torch.randint(-3, 4, (9, 130), generator=generator).float()
    left[:, :20] *= 30
    right[:, :20] *= 30
    return DenseOuter(left, right)


@pytest.fixture
def on_tiles(monkeypatch):
    """Take the GPU's way, interpreted; a small sample; and note the rooms that were asked for."""
    pytest.importorskip("triton")
    from without_gpu.interpreter import interpreted

    rooms = []
    real = topk_module.outer_above

    def spy(left, right, threshold, starts):
        rooms.append(int(starts[-1]))
        return real(left, right, threshold, starts)

    monkeypatch.setattr(topk_module, "outer_above", spy)
    monkeypatch.setattr(topk_module, "SAMPLE", 2**10)
    with interpreted():
        yield rooms


@pytest.mark.parametrize("excluded", [None, 0, 300], ids=["", "none", "some"])
@pytest.mark.parametrize("k", [1, 40, 350])
@pytest.mark.parametrize("which", ["spread", "crowded"])
def test_fact15_tiles_choose_the_same(on_tiles, make_pattern, which, k, excluded) -> None:
    outer = crowded()
    if which == "spread":
        outer = DenseOuter(outer.left[:, 20:], outer.right[:, 20:])
    exclude = None if excluded is None else make_pattern(*outer.shape, excluded)
    found = topk_outer(outer, k, exclude)
    assert on_tiles, "rows were multiplied block by block"
    assert torch.equal(found, topk_outer_reference(outer, k, exclude))


def test_a_crowded_tile_is_given_room(on_tiles) -> None:
    outer = crowded()
    found = topk_outer(outer, 350)
    assert len(on_tiles) == 2
    assert torch.equal(found, topk_outer_reference(outer, 350))


@pytest.mark.parametrize("k", [0, 150 * 130, 3000])
def test_where_a_guess_is_of_no_use_row_blocks_choose(on_tiles, k) -> None:
    outer = crowded()
    assert torch.equal(topk_outer(outer, k), topk_outer_reference(outer, k))
    assert not on_tiles


def test_too_high_a_guess_is_noticed(on_tiles, monkeypatch) -> None:
    outer = crowded()
    monkeypatch.setattr(topk_module, "_threshold", lambda *_: (torch.tensor(1e9), 0.1))
    assert torch.equal(topk_outer(outer, 40), topk_outer_reference(outer, 40))
    assert len(on_tiles) == 1


def test_a_support_of_the_largest_leaves_enough_above_the_guess(on_tiles, monkeypatch) -> None:
    outer = crowded()
    largest = topk_outer_reference(outer, 300)
    exclude = Pattern(largest.int(), outer.shape)
    expected = topk_outer_reference(outer, 40, exclude)
    monkeypatch.setattr(topk_module, "_from_blocks", lambda *_: pytest.fail("the guess was lost"))
    assert torch.equal(topk_outer(outer, 40, exclude), expected)
