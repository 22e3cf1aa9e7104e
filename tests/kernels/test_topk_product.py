from __future__ import annotations

import pytest
import torch

from sft.kernels.topk_product import topk_product, topk_product_reference


def statistics(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "floats":
        return torch.rand(n, generator=generator)
    if kind == "zeros and ties":
        return torch.randint(3, (n,), generator=generator).float()
    if kind == "all equal":
        return torch.full((n,), 0.1)
    if kind == "all zero":
        return torch.zeros(n)
    # every magnitude of a float32, denormal ones included
    return torch.rand(n, generator=generator) * 2.0 ** torch.randint(-148, 60, (n,)).float()


KINDS = ["floats", "zeros and ties", "all equal", "all zero", "wide"]


@pytest.mark.parametrize("k, excluded", [(0, 0), (1, 0), (10, 0), (30, 40), (117, 5), (117, 117)])
@pytest.mark.parametrize("kind", KINDS)
def test_fact19_equals_brute_force(make_pattern, kind: str, k: int, excluded: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        row, col = statistics(kind, 13, generator), statistics(kind, 9, generator)
        exclude = make_pattern(13, 9, excluded)
        got = topk_product(row, col, k, exclude)
        assert torch.equal(got, topk_product_reference(row, col, k, exclude)), (seed, row, col)


def test_fact19_neighbours_in_the_last_bit() -> None:
    # products that differ in the 48th bit are told apart, products that do not are tied
    one = torch.tensor(1.0)
    row = torch.stack([one, torch.nextafter(one, one * 2), one])
    col = torch.stack([torch.nextafter(one, one * 2), one, torch.nextafter(one, one * 0)])
    from sft.kernels.pattern import Pattern

    nothing = Pattern(torch.empty(0, dtype=torch.int32), (3, 3))
    for k in range(1, 10):
        got = topk_product(row, col, k, nothing)
        assert torch.equal(got, topk_product_reference(row, col, k, nothing)), k


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_fact19_thin_shapes(make_pattern, shape: tuple[int, int]) -> None:
    row, col = torch.rand(shape[0]), torch.rand(shape[1])
    for excluded in (0, 1):
        exclude = make_pattern(*shape, excluded, torch.int64)
        for k in range(11):
            got = topk_product(row, col, k, exclude)
            assert torch.equal(got, topk_product_reference(row, col, k, exclude))


@pytest.mark.parametrize("kind", ["floats", "zeros and ties", "all equal"])
def test_fact20_memory_is_no_product(make_pattern, largest_tensor, kind: str) -> None:
    rows, cols, k = 512, 768, 512 * 768 // 200
    generator = torch.Generator().manual_seed(0)
    row, col = statistics(kind, rows, generator), statistics(kind, cols, generator)
    exclude = make_pattern(rows, cols, k)
    assert largest_tensor(lambda: topk_product(row, col, k, exclude)) < 2 * rows * cols
    got = topk_product(row, col, k, exclude)
    assert torch.equal(got, topk_product_reference(row, col, k, exclude))
