from __future__ import annotations

import numpy as np
import pytest

from sft.evaluation.labels import compute_metrics, label_metrics
from sft.evaluation.token_classification import entities, tag_metrics

ALL = ["accuracy", "f1", "matthews"]


@pytest.mark.parametrize(
    ("predicted", "actual", "expected"),
    [
        ([1, 1, 0, 0], [1, 0, 0, 0], (0.75, 2 / 3, 1 / 3**0.5)),
        ([0, 1, 2, 2], [0, 1, 1, 2], (0.75, (1 + 2 / 3 + 2 / 3) / 3, 0.7)),
        ([1, 1, 1], [1, 1, 1], (1.0, 1.0, 0.0)),
        ([0, 0], [0, 0], (1.0, 0.0, 0.0)),
        ([0, 1], [1, 0], (0.0, 0.0, -1.0)),
        ([0, 3], [0, 3], (1.0, 1.0, 1.0)),
        ([], [], (0.0, 0.0, 0.0)),
    ],
    ids=["two", "three", "one-class", "none-of-it", "all-wrong", "gaps", "nothing"],
)
def test_metrics_on_cases_done_by_hand(predicted, actual, expected):
    assert tuple(label_metrics(predicted, actual, ALL).values()) == pytest.approx(expected)


def test_only_what_is_asked_for_in_its_order():
    assert list(label_metrics([0, 1], [0, 1], ["matthews", "accuracy"])) == ["matthews", "accuracy"]


def test_a_trainer_takes_them():
    from transformers import EvalPrediction

    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    found = compute_metrics(["accuracy"])(EvalPrediction(logits, np.array([1, 0, 0])))
    assert found == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("I-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("noun noun verb", {("noun", 0, 2), ("verb", 2, 3)}),
        ("O O", set()),
        ("", set()),
    ],
    ids=["plain", "no-begin", "neighbours", "bare", "none", "empty"],
)
def test_entities_by_their_tags(tags, found):
    assert entities(tags.split()) == found


def test_tag_metrics_on_a_case_done_by_hand():
    actual = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "O"]]
    found = tag_metrics(predicted, actual, ["token_accuracy", "token_f1", "entity_f1"])
    assert found == pytest.approx(
        {"token_accuracy": 4 / 6, "token_f1": 2 * 2 / (3 + 3), "entity_f1": 2 * 1 / (3 + 2)}
    )
