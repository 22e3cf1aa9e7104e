from __future__ import annotations

import math

import pytest

from sft import SpielConfig
from sft.adapters.deltas.schedule import Schedule


def schedule(**changes) -> Schedule:
    fields = {
        "every": 20,
        "window": 5,
        "fraction": 0.2,
        "policy": "linear",
        "first_full": True,
        "stop_fraction": 1.0,
        "total": 100,
    }
    return Schedule(**(fields | changes))


def reselections(s: Schedule) -> list[int]:
    return [t for t in range(1, 2 * s.total + 1) if s.reselects_after(t)]


def openings(s: Schedule) -> list[int]:
    return [t for t in range(1, 2 * s.total + 1) if s.opens_before(t)]


def test_fact25_steps_and_shares() -> None:
    s = schedule()
    assert reselections(s) == [5, 25, 45, 65, 85]
    shares = [s.replaced(t) for t in reselections(s)]
    assert shares == [1, 0.15, 0.11, 0.07, 0.03]


def test_windows_are_equally_long() -> None:
    s = schedule()
    assert openings(s) == [1, 21, 41, 61, 81]


def test_the_authors_later_windows_are_one_longer() -> None:
    s = schedule(reference=True)
    assert reselections(s) == [5, 25, 45, 65, 85]
    assert openings(s) == [1, 20, 40, 60, 80]


def test_cosine() -> None:
    s = schedule(policy="cosine")
    shares = [s.replaced(t) for t in reselections(s)]
    cosine = [0.1 * (1 + math.cos(math.pi * t / 100)) for t in (25, 45, 65, 85)]
    assert shares == pytest.approx([1, *cosine], rel=1e-12)
    assert schedule(policy="cosine", reference=True).replaced(5) == pytest.approx(
        0.1 * (1 + math.cos(math.pi * 0.05))
    )
    assert schedule(policy="linear", reference=True).replaced(5) == 1


@pytest.mark.parametrize("policy", ["linear", "cosine"])
def test_a_first_step_that_is_not_full(policy: str) -> None:
    assert schedule(policy=policy, first_full=False).replaced(5) == pytest.approx(
        schedule(policy=policy, first_full=True, window=4).replaced(5)
    )


@pytest.mark.parametrize("fraction, last", [(0.0, None), (0.04, None), (0.5, 45), (0.85, 85)])
def test_nothing_after_the_stop(fraction: float, last: int | None) -> None:
    s = schedule(stop_fraction=fraction)
    assert reselections(s) == [t for t in (5, 25, 45, 65, 85) if last is not None and t <= last]
    # a window that would not end is not opened
    assert len(openings(s)) == len(reselections(s))


@pytest.mark.parametrize("total", [5, 25])
def test_nothing_after_the_last_update(total: int) -> None:
    assert total not in reselections(schedule(total=total))
    assert total in reselections(schedule(total=total + 1))


@pytest.mark.parametrize("every, window", [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("reference", [False, True])
def test_windows_never_overlap(every: int, window: int, reference: bool) -> None:
    if reference and window == every:
        with pytest.raises(ValueError, match=f"window: got {window}, allowed is 1 to"):
            schedule(every=every, window=window, reference=True)
        return
    s = schedule(every=every, window=window, reference=reference)
    opened = None
    for t in range(1, 101):
        if s.opens_before(t):
            assert opened is None
            opened = t
        if s.reselects_after(t):
            assert opened is not None
            later = reference and opened > 1
            assert t - opened + 1 == window + later
            opened = None


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("window", 21, "window: got 21, allowed is 1 to reselect_every (20)"),
        ("window", 0, "window: got 0, allowed is 1 to reselect_every (20)"),
        ("reselect_every", 0, "reselect_every: got 0, allowed is a whole number of at least 1"),
        ("reselect_every", -3, "reselect_every: got -3"),
        ("replace_fraction", 1.1, "replace_fraction: got 1.1, allowed is 0 to 1"),
        ("replace_fraction", -0.1, "replace_fraction: got -0.1"),
        ("replace_schedule", "step", "replace_schedule: got 'step', allowed is linear or cosine"),
        ("stop_fraction", 2, "stop_fraction: got 2, allowed is 0 to 1"),
        ("growth", "dense", "growth: got 'dense', allowed is gradient, momentum, none"),
        ("candidates_from", "batch", "candidates_from: got 'batch', allowed is micro_batch or"),
        ("optimizer", "sgd", "optimizer: got 'sgd', allowed is auto, adamw, sm3, trainer"),
        ("selection", "best", "selection: got 'best', allowed are fisher, gradient, magnitude"),
        ("selection_order", "up", "selection_order: got 'up', allowed is largest or smallest"),
        ("calibration_batches", 0, "calibration_batches: got 0, allowed is a whole number"),
    ],
)
def test_fact27_bad_fields_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SpielConfig(**{field: value})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_momentum_needs_sm3() -> None:
    for optimizer in ("adamw", "trainer"):
        with pytest.raises(ValueError, match=f"optimizer: got '{optimizer}', allowed is sm3"):
            SpielConfig(growth="momentum", optimizer=optimizer)
    for optimizer in ("auto", "sm3"):
        SpielConfig(growth="momentum", optimizer=optimizer)
