from __future__ import annotations

import pytest
import torch

from sft.kernels import topk as module
from sft.kernels.topk import StreamingTopK, top_k, top_k_reference


@pytest.mark.parametrize("k", [-1, 0, 1, 7, 50, 51])
@pytest.mark.parametrize("levels", [1, 3, 10**6], ids=["all tied", "many ties", "no ties"])
def test_equals_the_oracle(levels: int, k: int) -> None:
    scores = torch.randint(levels, (50,), generator=torch.Generator().manual_seed(k)).float()
    assert torch.equal(top_k(scores, k), top_k_reference(scores, max(0, k)))


@pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("k", [255, 256, 300, 500])
def test_many_scores_are_found_by_a_sample(monkeypatch, k: int, order: str, levels: int) -> None:
    found = []
    real = module._likely
    monkeypatch.setattr(module, "_likely", lambda s, k: found.append(real(s, k)) or found[-1])
    scores = torch.randint(levels, (4000,), generator=torch.Generator().manual_seed(k)).float()
    if order != "random":
        scores = scores.sort(descending=order == "descending").values
    assert torch.equal(top_k(scores, k), top_k_reference(scores, k))
    assert (found[0] is None) == (k == 255)


def test_a_sample_that_misleads_is_given_up() -> None:
    scores = torch.rand(4000)
    scores[::16] += 1  # the sample holds all large scores, and fewer than k
    assert module._likely(scores, 300) is None
    assert torch.equal(top_k(scores, 300), top_k_reference(scores, 300))


def test_no_scores() -> None:
    assert top_k(torch.empty(0), 3).tolist() == []
    assert StreamingTopK(3).positions().tolist() == []


def test_infinite_scores_win() -> None:
    scores = torch.tensor([1.0, float("inf"), 2.0, float("inf"), float("-inf")])
    assert top_k(scores, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_equals_the_whole(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    scores = torch.randint(1 + draw(8), (1 + draw(60),), generator=generator).float()
    stream, start = StreamingTopK(draw(20)), 0
    while start < scores.numel():
        stop = min(scores.numel(), start + 1 + draw(9))
        stream.push(scores[start:stop], start)
        start = stop
    assert torch.equal(stream.positions(), top_k_reference(scores, stream.k))


def test_a_stream_leaves_excluded_entries_out() -> None:
    stream = StreamingTopK(3)
    stream.push(torch.tensor([float("-inf"), 1.0, float("-inf")]), 0)
    stream.push(torch.tensor([float("-inf"), 0.0]), 3)
    assert stream.positions().tolist() == [1, 4]


def test_a_stream_keeps_k_entries(largest_tensor) -> None:
    stream, blocks = StreamingTopK(10), torch.rand(64, 100)
    peak = largest_tensor(lambda: [stream.push(block, 100 * i) for i, block in enumerate(blocks)])
    assert peak <= 8 * (100 + 10)
