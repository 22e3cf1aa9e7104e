"""Drop and grow: hand-made cases, and an obvious Python oracle on random ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sft.adapters.deltas.reselection import drop_and_grow, drop_and_grow_by_product


def by_gradient(indices, values, candidates, scores, n) -> dict[int, tuple[str, int]]:
    """The next support as {position: ("kept", old slot) or ("grown", candidate)}."""
    by_size = sorted(range(len(indices)), key=lambda j: (abs(values[j]), j))
    dropped = by_size[:n]
    staying = {indices[j] for j in by_size[n:]}
    valid = [c for c in range(len(candidates)) if candidates[c] not in staying]
    won = sorted(valid, key=lambda c: (-abs(scores[c]), candidates[c]))[:n]
    again = {candidates[c] for c in won} & set(indices)
    grown = [c for c in won if candidates[c] not in again]
    leaving = [j for j in dropped if indices[j] not in again][: len(grown)]
    kept = {indices[j]: ("kept", j) for j in range(len(indices)) if j not in leaving}
    return kept | {candidates[c]: ("grown", c) for c in grown}


def as_dict(chosen) -> dict[int, tuple[str, int]]:
    found = {}
    rows = zip(*(t.tolist() for t in chosen), strict=True)
    for position, source, candidate in rows:
        assert (source < 0) != (candidate < 0)
        found[position] = ("kept", source) if source >= 0 else ("grown", candidate)
    return found


def tensors(indices, values, candidates, scores):
    return (
        torch.tensor(indices, dtype=torch.int32),
        torch.tensor(values, dtype=torch.float32),
        torch.tensor(candidates, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float32),
    )


def drawing(generator: torch.Generator) -> Callable[[int, int], int]:
    """Draw whole numbers from `low` to below `high`."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    return draw


@pytest.mark.parametrize("seed", range(300))
def test_fact03_fact04_fact10_equals_the_oracle(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = drawing(generator)
    numel = draw(2, 40)
    k, c = draw(1, numel + 1), draw(0, numel + 1)
    indices = torch.randperm(numel, generator=generator)[:k].sort().values.tolist()
    candidates = torch.randperm(numel, generator=generator)[:c].sort().values.tolist()
    # few levels: many ties; both signs
    values = torch.randint(-2, 3, (k,), generator=generator).tolist()
    scores = torch.randint(-3, 4, (c,), generator=generator).tolist()
    n = draw(0, k + 1)
    chosen = drop_and_grow(*tensors(indices, values, candidates, scores), n)
    assert as_dict(chosen) == by_gradient(indices, values, candidates, scores, n)
    assert chosen.indices.numel() == k
    assert (chosen.indices[1:] > chosen.indices[:-1]).all()


def test_fact10_smallest_deltas_leave_ties_by_index() -> None:
    chosen = drop_and_grow(
        *tensors([1, 3, 5, 7], [0.5, -0.1, 0.1, 0.1], [0, 2], [1.0, 2.0]), num_replaced=2
    )
    assert chosen.indices.tolist() == [0, 1, 2, 7]
    assert chosen.source.tolist() == [-1, 0, -1, 3]
    assert chosen.candidate.tolist() == [0, -1, 1, -1]


def test_fact13_slots_follow_positions() -> None:
    # a grown low position shifts every kept entry one slot up
    chosen = drop_and_grow(*tensors([4, 5, 6], [3.0, 2.0, 0.0], [1], [9.0]), 1)
    assert chosen.indices.tolist() == [1, 4, 5]
    assert chosen.source.tolist() == [-1, 0, 1]


def test_fact14_dropped_and_won_again_stays() -> None:
    # 3 is the smallest delta and the largest score: it stays, so does the next smallest
    chosen = drop_and_grow(*tensors([3, 8], [0.0, 1.0], [3, 5], [9.0, 1.0]), 1)
    assert chosen.indices.tolist() == [3, 8]
    assert chosen.source.tolist() == [0, 1]
    # of two dropped, one wins again; the other winner replaces the one that is left
    chosen = drop_and_grow(*tensors([3, 4, 8], [0.0, 0.5, 1.0], [3, 5, 6], [9.0, 1.0, 2.0]), 2)
    assert as_dict(chosen) == {3: ("kept", 0), 6: ("grown", 2), 8: ("kept", 2)}


def test_active_candidates_that_stay_cannot_win() -> None:
    chosen = drop_and_grow(*tensors([3, 8], [0.0, 1.0], [5, 8], [1.0, 9.0]), 1)
    assert as_dict(chosen) == {5: ("grown", 0), 8: ("kept", 1)}


def test_fact16_scores_count_by_their_size_not_their_sign() -> None:
    chosen = drop_and_grow(*tensors([0], [0.0], [5, 6, 7], [1.0, -3.0, 2.0]), 1)
    assert chosen.indices.tolist() == [6]


def test_fact26_a_full_first_step_takes_all_candidates() -> None:
    chosen = drop_and_grow(*tensors([0, 2, 4], [5.0, 6.0, 7.0], [1, 3, 9], [0.1, 0.2, 0.0]), 3)
    assert chosen.indices.tolist() == [1, 3, 9]
    assert chosen.source.tolist() == [-1, -1, -1]


def test_fewer_candidates_replace_fewer_and_the_smallest() -> None:
    chosen = drop_and_grow(*tensors([0, 2, 4], [2.0, 1.0, 3.0], [9], [1.0]), 3)
    assert as_dict(chosen) == {0: ("kept", 0), 4: ("kept", 2), 9: ("grown", 0)}
    nothing = drop_and_grow(*tensors([0, 2, 4], [2.0, 1.0, 3.0], [], []), 3)
    assert nothing.source.tolist() == [0, 1, 2]


# -- by the product of row and column statistics ---------------------------------------------


def grow_by_product(indices, values, row, col, n, seed=0):
    return drop_and_grow_by_product(
        torch.tensor(indices, dtype=torch.int32),
        torch.tensor(values, dtype=torch.float32),
        torch.tensor(row, dtype=torch.float32),
        torch.tensor(col, dtype=torch.float32),
        n,
        torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("seed", range(200))
def test_fact19_equals_the_oracle(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = drawing(generator)
    rows, cols = draw(1, 7), draw(1, 7)
    numel = rows * cols
    k = draw(1, numel + 1)
    indices = torch.randperm(numel, generator=generator)[:k].sort().values.tolist()
    values = torch.randint(-2, 3, (k,), generator=generator).tolist()
    row = torch.randint(3, (rows,), generator=generator).tolist()
    col = torch.randint(3, (cols,), generator=generator).tolist()
    n = draw(0, k + 1)
    chosen = grow_by_product(indices, values, row, col, n, seed)

    replaced = min(n, numel - k)
    free = [j for j in range(numel) if j not in indices]
    ranked = sorted(free, key=lambda j: (-row[j // cols] * col[j % cols], j))
    positive = [j for j in ranked[:replaced] if row[j // cols] * col[j % cols] > 0]
    leaving = sorted(range(k), key=lambda j: (abs(values[j]), j))[:replaced]
    found = as_dict(chosen)
    grown = {position for position, (what, _) in found.items() if what == "grown"}
    assert len(grown) == replaced
    assert set(positive) <= grown <= set(free)
    kept = {indices[j]: ("kept", j) for j in range(k) if j not in leaving}
    assert {p: how for p, how in found.items() if how[0] == "kept"} == kept
    assert chosen.indices.numel() == k
    assert (chosen.indices[1:] > chosen.indices[:-1]).all()


def test_what_is_dropped_cannot_come_back_by_product() -> None:
    chosen = grow_by_product([0], [0.0], [9, 1], [9, 1], 1)
    assert chosen.indices.tolist() == [1]


def test_untouched_statistics_are_filled_at_random() -> None:
    drawn = {
        tuple(grow_by_product([3, 7], [0.0, 1.0], [0] * 5, [0] * 5, 1, seed).indices.tolist())
        for seed in range(40)
    }
    assert len(drawn) > 10
    again = [grow_by_product([3, 7], [0, 1], [0] * 5, [0] * 5, 1, 3).indices for _ in range(2)]
    assert torch.equal(*again)
