"""Facts of the schedule of strengths: where stages end, and how strong each is."""

from __future__ import annotations

import numpy as np
import pytest

from sft.adapters.gates.stages import stage_ends, stage_of, strengths_between


def test_s10_strengths_follow_their_path() -> None:
    assert strengths_between("linear", 0, 7e-4, 7) == np.linspace(0, 7e-4, 7).tolist()
    assert strengths_between("geometric", 0.1, 3.0, 5) == np.geomspace(0.1, 3, 5).tolist()
    found = strengths_between("log_linear", 0.0, 2.0, 4)
    assert found == np.log(np.linspace(1, np.exp(2), 4)).tolist()
    assert strengths_between("linear", 0.3, 0.9, 1) == [0.3]


def test_paths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^strength_path: got 'cubic', allowed is linear, geo"):
        strengths_between("cubic", 0, 1, 3)
    with pytest.raises(ValueError, match=r"^strength: got 0, allowed is above 0 with"):
        strengths_between("geometric", 0, 1, 3)
    with pytest.raises(ValueError, match=r"^strength: got 900.0, allowed is below 700 with"):
        strengths_between("log_linear", 0.0, 900.0, 3)


@pytest.mark.parametrize("total", [7, 8, 80, 1001])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("share", [None, 0.01, 0.4, 0.99])
def test_stages_cover_the_run(total: int, count: int, share: float | None) -> None:
    ends = stage_ends(total, count, share)
    lengths = np.diff([0, *ends])
    assert len(ends) == count and ends[-1] == total and (lengths > 0).all()
    rest = lengths if share is None else lengths[1:]
    assert count == 1 or max(rest) - min(rest) <= 1
    found = [stage_of(step, ends) for step in range(total)]
    assert [found.count(stage) for stage in range(count)] == lengths.tolist()
    assert found == sorted(found) and stage_of(total, ends) == count - 1


def test_the_first_stage_takes_its_share() -> None:
    assert stage_ends(100, 6, 0.5) == (50, 60, 70, 80, 90, 100)
    assert stage_ends(100, 4, None) == (25, 50, 75, 100)


def test_a_run_too_short_for_its_stages_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_steps: got 3, allowed is at least 4, one update"):
        stage_ends(3, 4, None)
