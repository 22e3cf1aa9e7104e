"""A layer's window: candidates, sums per update, counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sft.adapters.deltas.window import Window
from sft.kernels.outer import DenseOuter
from sft.kernels.pattern import Pattern
from sft.kernels.topk import top_k_reference

ROWS, COLS = 8, 6


@dataclass
class Spot:
    pattern: Pattern
    tap: Any = None


def open_window(k: int = 5, *, include_active: bool = False, whole: bool = False):
    site = Spot(Pattern(torch.arange(0, 2 * k, 2), (ROWS, COLS)))
    return site, Window(site, include_active=include_active, whole_update=whole)


def gradient(seed: int, tokens: int = 7, dtype: torch.dtype = torch.float32) -> DenseOuter:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(tokens, ROWS, generator=generator)
    return DenseOuter(left.to(dtype), torch.randn(tokens, COLS, generator=generator).to(dtype))


def dense(outer: DenseOuter) -> torch.Tensor:
    return outer.block(0, ROWS).flatten()


@pytest.mark.parametrize("include_active", [False, True])
def test_fact15_candidates_are_the_largest_of_the_first_micro_batch(include_active: bool) -> None:
    site, window = open_window(include_active=include_active)
    site.tap(gradient(0))
    site.tap(gradient(1))
    scores = dense(gradient(0)).abs()
    if not include_active:
        scores[site.pattern.indices] = -1
    assert torch.equal(window.candidates, top_k_reference(scores, 5))


@pytest.mark.parametrize("include_active", [False, True])
def test_candidates_of_a_whole_update(include_active: bool) -> None:
    site, window = open_window(include_active=include_active, whole=True)
    for seed in range(3):
        site.tap(gradient(seed))
    assert window.candidates.numel() == 0
    window.close_update(1.0)
    total = sum(dense(gradient(seed)) for seed in range(3))
    scores = total.abs()
    if not include_active:
        scores[site.pattern.indices] = -1
    assert torch.equal(window.candidates, top_k_reference(scores, 5))
    torch.testing.assert_close(window.total, total[window.candidates], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("splits", [1, 8, 128])
def test_fact17_means_do_not_depend_on_the_split(splits: int, whole: bool) -> None:
    """One update of 128 tokens in one, 8 or 128 backward passes gives the same sums."""
    site, window = open_window(whole=whole)
    updates = [gradient(seed, tokens=128) for seed in range(3)]
    for update in updates:
        for rows in zip(update.left.chunk(splits), update.right.chunk(splits), strict=True):
            site.tap(DenseOuter(*rows))
        window.close_update(1.0)
    truth = torch.stack([dense(update)[window.candidates] for update in updates])
    assert window.updates == 3
    torch.testing.assert_close(window.total, truth.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(window.total_square, truth.square().sum(0), rtol=1e-5, atol=1e-4)


def test_fact16_alternating_gradients_cancel() -> None:
    site, window = open_window()
    left, right = torch.zeros(1, ROWS), torch.zeros(1, COLS)
    left[0, 1], right[0, 1], right[0, 2] = 1.0, 5.0, 1.0  # position 7: 5, position 8 is active
    right[0, 3] = 2.0  # position 9: 2
    for update in range(4):
        flipped = right.clone()
        flipped[0, 1] *= (-1) ** update
        site.tap(DenseOuter(left, flipped))
        window.close_update(1.0)
    total = dict(zip(window.candidates.tolist(), window.total.tolist(), strict=True))
    square = dict(zip(window.candidates.tolist(), window.total_square.tolist(), strict=True))
    assert (total[7], total[9]) == (0.0, 8.0)
    assert (square[7], square[9]) == (100.0, 16.0)


def test_fact18_sums_and_counters_pass_256_in_bf16() -> None:
    site, window = open_window()
    ones = DenseOuter(torch.full((1, ROWS), 0.25).bfloat16(), torch.ones(1, COLS).bfloat16())
    for _ in range(5):
        for _ in range(128):
            site.tap(ones)
        window.close_update(1.0)
    assert window.updates == 5
    assert window.total.dtype == window.total_square.dtype == torch.float32
    assert window.total.unique().tolist() == [640 * 0.25]
    assert window.total_square.unique().tolist() == [5 * 32.0**2]


def test_gradients_are_unscaled() -> None:
    plain, scaled = open_window(), open_window()
    for update in range(3):
        outer, scale = gradient(update), 2.0**update
        plain[0].tap(outer)
        plain[1].close_update(1.0)
        scaled[0].tap(DenseOuter(outer.left * scale, outer.right))
        scaled[1].close_update(scale)
    assert torch.equal(plain[1].candidates, scaled[1].candidates)
    torch.testing.assert_close(scaled[1].total, plain[1].total)
    torch.testing.assert_close(scaled[1].total_square, plain[1].total_square)


@pytest.mark.parametrize("whole", [False, True])
def test_void_updates_leave_no_trace(whole: bool) -> None:
    site, window = open_window(whole=whole)
    overflowed = gradient(9)
    overflowed.left[0] = float("inf")
    site.tap(overflowed)
    window.close_update(0.0)
    assert (window.updates, window.total) == (0, None)
    for seed in (0, 1):
        site.tap(gradient(seed))
        window.close_update(1.0)
        site.tap(overflowed)
        window.close_update(0.0)
    clean_site, clean = open_window(whole=whole)
    for seed in (0, 1):
        clean_site.tap(gradient(seed))
        clean.close_update(1.0)
    assert window.updates == clean.updates == 2
    assert torch.equal(window.candidates, clean.candidates)
    assert torch.equal(window.total, clean.total)
    assert torch.equal(window.total_square, clean.total_square)


def test_an_update_without_this_layer_does_not_count() -> None:
    site, window = open_window()
    site.tap(gradient(0))
    window.close_update(1.0)
    window.close_update(1.0)
    assert window.updates == 1


def test_a_closed_window_listens_no_more() -> None:
    site, window = open_window()
    assert site.tap is not None
    window.close()
    assert site.tap is None


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_fact32_a_window_continues_from_its_state(cut: int, whole: bool) -> None:
    straight_site, straight = open_window(whole=whole)
    site, window = open_window(whole=whole)
    for update in range(3):
        if update == cut:
            saved = {name: tensor.clone() for name, tensor in window.state().items()}
            site, window = open_window(whole=whole)
            window.load_state(saved)
        for micro in range(2):
            straight_site.tap(gradient(10 * update + micro))
            site.tap(gradient(10 * update + micro))
        straight.close_update(1.0)
        window.close_update(1.0)
    assert window.updates == straight.updates == 3
    for name in ("candidates", "total", "total_square"):
        assert torch.equal(getattr(window, name), getattr(straight, name)), name


def test_candidates_are_all_that_is_left_when_few_are() -> None:
    site = Spot(Pattern(torch.arange(ROWS * COLS - 2), (ROWS, COLS)))
    for whole in (False, True):
        window = Window(site, include_active=False, whole_update=whole)
        site.tap(gradient(0))
        window.close_update(1.0)
        assert window.candidates.tolist() == [ROWS * COLS - 2, ROWS * COLS - 1]
