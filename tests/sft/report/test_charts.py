"""Charts and maps: what they show of a log, and where they draw it."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from sft.report.charts import Chart, Map, Series, thinned, ticks
from sft.report.curves import curves
from sft.report.folder import read_run
from sft.report.maps import maps
from sft.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, svg


def by_key(charts):
    return {chart.key: chart for chart in charts}


def test_the_log_becomes_curves(made_lines):
    judged, others, course = map(by_key, curves(made_lines, {"exact_match": 0.05}))
    assert list(judged) == ["loss", "exact_match"]
    assert list(others) == ["rewards_mean"]
    assert list(course) == [
        "learning_rate", "grad_norm", "tokens_per_second", "peak_memory", "churn", "ranks",
    ]  # fmt: skip
    training, held_out = judged["loss"].series
    assert training.points[0] == (1, 4.0)
    assert held_out.points == [(4, 0.75), (8, 0.375)]
    assert judged["exact_match"].series[0].points == [(0, 0.05), (4, 0.4), (8, 0.8)]
    assert course["churn"].series[0].points == [(4, 0.25), (8, 0.25)]
    assert course["peak_memory"].series[0].points[0] == (1, 1.0)
    mean, largest, smallest = course["ranks"].series
    assert mean.points == [(3, 11.5), (6, 8.5)]
    assert (largest.points[-1], smallest.points[-1]) == ((6, 11.0), (6, 6.0))


def test_the_support_becomes_maps(run_folder):
    found = by_key(maps(read_run(run_folder())))
    assert list(found) == ["density", "change", "churn_by_module", "ranks_by_module"]
    density = found["density"]
    assert (density.rows, density.columns) == (["q_proj", "v_proj", "up_proj"], ["0", "1"])
    for row, wanted in zip(density.values, [[0.1, 0.13], [0.11, 0.14], [0.12, 0.15]], strict=True):
        assert row == pytest.approx(wanted)
    assert found["change"].values[0] == [0.1, 0.4]  # norm over the root of 100 weights
    assert found["churn_by_module"].values[1] == [0.2, 0.8]  # twice 10 and 40, of 100
    assert found["ranks_by_module"].values[2] == [8.0, 11.0]


def test_a_map_shades_from_zero_unless_all_is_far_from_it():
    near = Map("m", "m", ["a"], ["0", "1"], [[0.1, 0.9]])
    assert (near.low, near.shade(0.9), near.shade(0.1)) == (0.0, 1.0, pytest.approx(1 / 9))
    far = Map("m", "m", ["a"], ["0", "1", "2"], [[8.0, 9.0, None]])
    assert (far.shade(8.0), far.shade(9.0)) == (0.0, 1.0)
    assert not far.is_even
    assert Map("m", "m", ["a"], ["0", "1"], [[0.01, 0.010000001]]).is_even


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (2.4, 8.5), (-3, 7), (0, 2.5e-3), (5, 5), (0, 0), (-2, -2), (1e6, 3e6)],
)
def test_ticks_are_round_and_hold_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high
    gaps = {round((b - a) / (found[1] - found[0]), 9) for a, b in pairwise(found)}
    assert gaps == {1.0}


def test_long_series_are_thinned_to_means():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    found = thinned(points, 100)
    assert len(found) == 100
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert all(abs(y - 0.5) < 0.01 for _, y in found[1:-1])
    assert thinned(points[:50], 100) == points[:50]


def test_a_curve_lies_where_its_values_are():
    drawn = svg(Chart("loss", "Loss", [Series("training", [(0, 0.0), (5, 1.0), (10, 4.0)])]))
    path = re.search(r'class="curve" d="M(.*?)"', drawn).group(1)
    at = [tuple(map(float, pair.split())) for pair in path.split("L")]
    bottom, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    assert at[0] == (LEFT, bottom)
    assert at[1] == pytest.approx(((LEFT + WIDTH - RIGHT) / 2, bottom - height / 4), abs=0.1)
    assert at[2] == (WIDTH - RIGHT, TOP)
    assert "training goes from 0 at step 0 to 4 at step 10" in drawn
    assert "<title>step 5: training 1</title>" in drawn


def test_bars_reach_down_to_zero():
    chart = Chart("c", "C", [Series("s", [(2, 0.5), (6, 1.0)])], bars=True, from_zero=True)
    bars = re.findall(r'class="bar".*?y="([\d.]+)".*?height="([\d.]+)"', svg(chart))
    for y, height in bars:
        assert float(y) + float(height) == pytest.approx(HEIGHT - BOTTOM, abs=0.11)
    assert float(bars[1][1]) == pytest.approx(2 * float(bars[0][1]), abs=0.2)


def test_one_point_and_a_constant_are_drawn():
    for points in ([(3, 1.0)], [(1, 0.0), (2, 0.0)]):
        assert "NaN" not in svg(Chart("c", "C", [Series("s", points)]))
