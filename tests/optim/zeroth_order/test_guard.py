"""Facts of the guard: what stops a run, when, and what its one line tells to change."""

from __future__ import annotations

import math

import pytest

from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.guard import BLIND, BLIND_COUNTS, WINDOW, DivergenceGuard


def guard(**changes: object) -> DivergenceGuard:
    return DivergenceGuard(ZerothOrderConfig(**changes))  # type: ignore[arg-type]


def feed(guarded: DivergenceGuard, *losses: float) -> int:
    """Feed one loss an update; return how many were taken."""
    for loss in losses:
        guarded.feed(loss, [loss + 0.1, loss - 0.1], lr=3e-6)
    return len(losses)


def test_a_loss_that_rises_stops_the_run_and_names_a_third_of_the_rate() -> None:
    guarded = guard(divergence=2.0)
    feed(guarded, *[1.0] * WINDOW, *[3.0] * WINDOW)  # risen by exactly the bound
    with pytest.raises(ValueError, match=r"^learning_rate: got 3e-06.*rose from 1 to 3.*=1e-06 "):
        feed(guarded, 3.1)


def test_neither_a_falling_loss_nor_single_peaks_stop_it() -> None:
    losses = [*[5.0] * WINDOW, *([1.0, 9.0] * WINDOW), *[1.0] * WINDOW, *[6.9] * WINDOW]
    guarded = guard(divergence=2.0)
    assert feed(guarded, *losses) == len(losses)
    with pytest.raises(ValueError, match=r"^learning_rate"):  # it was on its guard all the while
        feed(guarded, *[7.1] * WINDOW)


def test_no_bound_never_stops() -> None:
    losses = [*[1.0] * WINDOW, *[1e9] * WINDOW]
    assert feed(guard(divergence=None), *losses) == len(losses)
    with pytest.raises(ValueError, match=r"^learning_rate"):
        feed(guard(divergence=2.0), *losses)


def test_z15_losses_that_are_not_finite_stop_after_a_streak() -> None:
    guarded = guard(max_skipped=3, eps=1e-3)
    feed(guarded, math.nan, math.inf, 1.0, math.nan, math.nan)
    with pytest.raises(ValueError, match=r"3 updates in a row at lr=3e-06, eps=0.001; .*=1e-06"):
        guarded.feed(1.0, [1.0, math.nan], lr=3e-6)


def test_skipped_losses_do_not_count_as_losses() -> None:
    guarded = guard(max_skipped=2)
    assert feed(guarded, *[math.inf, 1.0] * (2 * WINDOW)) == 4 * WINDOW
    with pytest.raises(ValueError, match="2 updates in a row"):
        feed(guarded, math.inf, math.inf)


@pytest.mark.parametrize(
    ("objective", "patience", "remedy"),
    [("loss", BLIND, "num_iterations=2"), ("accuracy", BLIND_COUNTS, "larger eps or batch")],
)
def test_a_loss_that_never_differs_stops_the_run(
    objective: str, patience: int, remedy: str
) -> None:
    guarded = guard(objective=objective)
    for _ in range(patience - 1):
        guarded.feed(0.5, [0.5, 0.5, 0.5], lr=1e-6)
    with pytest.raises(ValueError, match=f"^eps: got 0.001.*first {patience} updates.*{remedy}"):
        guarded.feed(0.5, [0.5, 0.5, 0.5], lr=1e-6)


def test_one_difference_is_proof_enough() -> None:
    seen, blind = guard(), guard()
    seen.feed(0.5, [0.5, 0.6], lr=1e-6)
    with pytest.raises(ValueError, match=r"^eps: got 0.001"):
        for _ in range(2 * BLIND):
            seen.feed(0.5, [0.5, 0.5], lr=1e-6)  # never raises, so the other one gets its turn
            blind.feed(0.5, [0.5, 0.5], lr=1e-6)
    assert blind._blind == BLIND and seen._blind is None


def test_messages_are_one_line() -> None:
    for losses in ([1.0] * WINDOW + [99.0] * WINDOW, [math.nan] * 99):
        with pytest.raises(ValueError) as caught:
            feed(guard(), *losses)
        assert "\n" not in str(caught.value)
