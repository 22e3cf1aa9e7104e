"""A recipe's promise is a bound on a metric, and a run that breaks it is told so."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from sft.recipe.expected import ExpectedSpec, broken


@pytest.mark.parametrize(
    ("bound", "value", "kept"),
    [
        ("<= 0.5", 0.5, True),
        ("< 0.5", 0.5, False),
        (">= 0.5", 0.49, False),
        ("> -1e-3", 0.0, True),
        ("<= 0.5", math.nan, False),
    ],
)
def test_bounds(bound, value, kept) -> None:
    assert (broken({"rate": bound}, {"rate": value}) == []) is kept


def test_a_metric_that_was_not_measured_is_a_broken_promise() -> None:
    assert broken({"rate": "<= 1"}, {}) == ["expected rate <= 1, got nan"]


@pytest.mark.parametrize("bound", ["0.5", "~ 0.5", "<= much", ""])
def test_what_is_no_bound_is_refused(bound) -> None:
    with pytest.raises(ValidationError, match="expected a bound"):
        ExpectedSpec(metrics={"rate": bound})


def test_the_line_names_bounds_and_cost() -> None:
    spec = ExpectedSpec(metrics={"nll": "<= 1"}, minutes=2, memory_gb=3.5)
    assert spec.line() == "nll <= 1; about 2 min on two CPU cores; 3.5 GB"
