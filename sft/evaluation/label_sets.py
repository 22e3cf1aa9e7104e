"""How right a classifier is that gives each example any number of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sft.evaluation.classification import batches, class_of
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec

NAMES = ("accuracy", "f1", "micro_f1")


@torch.no_grad()
def measure(
    model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`.

    Args:
        model: a sequence classifier; a class is given where its probability is above a half.
        processor: its tokenizer.
        rows: with `label`, a list of classes or their names, and `text` [, `text_pair`].
        format: of the rows.
        spec: the `evaluation:` section.
        longest: tokens kept of a text.
    """
    predicted: list[list[bool]] = []
    with evaluating(model):
        for batch in batches(processor, rows, format, spec.batch_size, longest):
            placed = {key: value.to(model.device) for key, value in batch.items()}
            predicted += (model(**placed).logits > 0).tolist()
    actual = [
        one_each([class_of(label, model.config) for label in row["label"]], model.config.num_labels)
        for row in rows
    ]
    return set_metrics(predicted, actual, spec.metrics or ())


def one_each(chosen: Sequence[int], classes: int) -> list[float]:
    """Return 1 for each class that is chosen and 0 for the others, as the loss takes them."""
    return [float(number in chosen) for number in range(classes)]


def set_metrics(
    predicted: Sequence[Sequence[float]], actual: Sequence[Sequence[float]], names: Sequence[str]
) -> dict[str, float]:
    """Return the named metrics of sets of classes.

    `accuracy` is the share of examples whose set is the right one. `f1` is the mean over the
    classes that occur or are predicted of F1 = 2 right / (predicted + actual), `micro_f1` that of
    all of them counted together.

    Args:
        predicted: (examples, classes), 0 or 1.
        actual: likewise.
        names: of `NAMES`.
    """
    p, a = np.asarray(predicted, bool), np.asarray(actual, bool)
    right, both = (p & a).sum(0), p.sum(0) + a.sum(0)
    there = both > 0
    known = {
        "accuracy": float((p == a).all(1).mean()),
        "f1": float(_f1(right[there], both[there]).mean()) if there.any() else 0.0,
        "micro_f1": float(_f1(right.sum(), both.sum())) if there.any() else 0.0,
    }
    return {name: known[name] for name in names}


def _f1(right: Any, both: Any) -> NDArray[np.float64]:
    return np.asarray(2 * right / both, np.float64)
