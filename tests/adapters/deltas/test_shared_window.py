"""Windows of several ranks: they choose by the mean gradient, and a rank without one counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sft.adapters.deltas.window import Window, share_updates
from sft.kernels.outer import DenseOuter
from sft.kernels.pattern import Pattern
from sft.kernels.topk import top_k_reference

SHAPES = {"a": (8, 6), "b": (5, 4)}
SIZES = {"a": 5, "b": 3}


@dataclass
class Spot:
    pattern: Pattern
    tap: Any = None


def windows(ranks, *, whole=False):
    made = {}
    for name, shape in SHAPES.items():
        site = Spot(Pattern(torch.arange(0, 2 * SIZES[name], 2), shape))
        made[name] = Window(site, include_active=False, whole_update=whole, name=name, ranks=ranks)
    return made


def outer(name, rank, update):
    drawn = torch.Generator().manual_seed(100 * rank + 10 * update + ord(name))
    rows, cols = SHAPES[name]
    return DenseOuter(torch.randn(7, rows, generator=drawn), torch.randn(7, cols, generator=drawn))


def dense(name, rank, update):
    return outer(name, rank, update).block(0, SHAPES[name][0]).flatten()


def train(ranks, reached, *, whole=False):
    """Make an update of each set of (rank, window) that backward reaches."""
    made = windows(ranks, whole=whole)
    for update, places in enumerate(reached):
        for name, window in made.items():
            if (ranks.rank, name) in places:
                window.observe(outer(name, ranks.rank, update))
        share_updates(list(made.values()), ranks)
        for window in made.values():
            window.close_update(1.0)
    return made


BOTH = {(0, "a"), (1, "a"), (0, "b"), (1, "b")}


def expected(name, reached, candidates):
    """Sums over the updates that any rank reached, of the mean with zeros for the others."""
    total, square, count = 0.0, 0.0, 0
    for update, places in enumerate(reached):
        held = [rank for rank in (0, 1) if (rank, name) in places]
        if held:
            mean = sum(dense(name, rank, update) for rank in held)[candidates] / 2
            total, square, count = total + mean, square + mean.square(), count + 1
    return total, square, count


CASES = {
    "all": [BOTH, BOTH],
    "one without": [BOTH, BOTH - {(1, "a")}, {(0, "b")}],
    "none": [BOTH, {(0, "b"), (1, "b")}, set()],
}


@pytest.mark.parametrize("whole", [False, True], ids=["first", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_choose_and_sum_by_the_mean(together, case, whole) -> None:
    reached = CASES[case]
    ranks = together(lambda seat: train(seat, reached, whole=whole))
    for name in SHAPES:
        first, second = (made[name] for made in ranks)
        scores = ((dense(name, 0, 0) + dense(name, 1, 0)) / 2).abs()
        scores[torch.arange(0, 2 * SIZES[name], 2)] = -1
        chosen = top_k_reference(scores, SIZES[name])
        total, square, count = expected(name, reached, chosen)
        for window in (first, second):
            assert torch.equal(window.candidates, chosen)
            assert window.updates == count
            torch.testing.assert_close(window.total, total)
            torch.testing.assert_close(window.total_square, square)
        assert torch.equal(first.total, second.total)


def test_a_rank_that_no_gradient_reached_chooses_with_the_others(together) -> None:
    """Of a whole update: a matrix that a rank's tokens missed is zeros there, and waits nowhere."""
    scores = dense("a", 1, 0).abs()
    scores[torch.arange(0, 2 * SIZES["a"], 2)] = -1
    chosen = top_k_reference(scores, SIZES["a"])
    for made in together(lambda seat: train(seat, [{(1, "a")}], whole=True)):
        assert torch.equal(made["a"].candidates, chosen)
        torch.testing.assert_close(made["a"].total, dense("a", 1, 0)[chosen] / 2)
        assert made["b"].updates == 0


def test_nothing_is_shared_where_nothing_was_seen(together) -> None:
    for whole in (False, True):
        for made in together(lambda seat, whole=whole: train(seat, [set(), set()], whole=whole)):
            assert all(w.updates == 0 and w.candidates.numel() == 0 for w in made.values())


def test_ranks_at_different_modules_end_with_an_error(together) -> None:
    def part(seat):
        windows(seat)["ab"[seat.rank]].observe(outer("ab"[seat.rank], seat.rank, 0))

    with pytest.raises(RuntimeError, match=r"^gradient of .: differs between the ranks"):
        together(part)
