"""Metrics of predicted classes: `accuracy`, `f1`, `matthews`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("accuracy", "f1", "matthews")


def label_metrics(
    predicted: Sequence[int], actual: Sequence[int], names: Sequence[str]
) -> dict[str, float]:
    """Return the named metrics of predictions.

    Args:
        predicted: classes, from 0 on.
        actual: the right ones.
        names: of `NAMES`.
    """
    counts = confusion(predicted, actual)
    known = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
    return {name: known[name](counts) for name in names}


def confusion(predicted: Sequence[int], actual: Sequence[int]) -> NDArray[np.int64]:
    """Return how often class i was taken for class j, at [i, j]."""
    p, a = np.asarray(predicted, np.int64), np.asarray(actual, np.int64)
    classes = int(max(p.max(initial=0), a.max(initial=0))) + 1
    return np.bincount(a * classes + p, minlength=classes**2).reshape(classes, classes)


def accuracy(counts: NDArray[np.int64]) -> float:
    """Return the share of right predictions."""
    return float(np.trace(counts) / max(counts.sum(), 1))


def f1(counts: NDArray[np.int64]) -> float:
    """Return F1 = 2 right / (predicted + actual): of class 1 of two, else the mean of all classes.

    Classes that neither occur nor are predicted do not count. Two classes are those of 0 and 1.
    """
    right, both = np.diag(counts), counts.sum(0) + counts.sum(1)
    if len(counts) <= 2:
        return float(2 * right[-1] / both[-1]) if len(counts) == 2 and both[-1] else 0.0
    there = both > 0
    return float(np.mean(2 * right[there] / both[there]))


def matthews(counts: NDArray[np.int64]) -> float:
    """Return Matthews' correlation of predicted and actual classes, in -1 to 1 (Gorodkin, 2004).

    (n right - sum_k p_k a_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k a_k^2)), with p_k and a_k how
    often class k was predicted and is right; 0 where one class is all there is.
    """
    n, right = float(counts.sum()), float(np.trace(counts))
    predicted, actual = counts.sum(0).astype(float), counts.sum(1).astype(float)
    spread = (n**2 - predicted @ predicted) * (n**2 - actual @ actual)
    return float((n * right - predicted @ actual) / np.sqrt(spread)) if spread > 0 else 0.0


def compute_metrics(names: Sequence[str] = NAMES) -> Any:
    """Return what a Trainer takes as `compute_metrics`, for one class an example.

    trainer = Trainer(..., compute_metrics=compute_metrics(["accuracy", "f1"]))
    """

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return label_metrics(logits.argmax(-1), prediction.label_ids, names)

    return compute
