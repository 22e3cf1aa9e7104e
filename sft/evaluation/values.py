"""How near predicted values are to real numbers: `mse` and `pearson`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sft.evaluation.classification import batches
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec

NAMES = ("mse", "pearson")


@torch.no_grad()
def measure(
    model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`.

    Args:
        model: a sequence classifier with one output.
        processor: its tokenizer.
        rows: with `label`, a number, and `text` [, `text_pair`].
        format: of the rows.
        spec: the `evaluation:` section.
        longest: tokens kept of a text.
    """
    predicted: list[float] = []
    with evaluating(model):
        for batch in batches(processor, rows, format, spec.batch_size, longest):
            placed = {key: value.to(model.device) for key, value in batch.items()}
            predicted += model(**placed).logits[:, 0].tolist()
    actual = [float(row["label"]) for row in rows]
    return value_metrics(predicted, actual, spec.metrics or ())


def value_metrics(
    predicted: Sequence[float], actual: Sequence[float], names: Sequence[str]
) -> dict[str, float]:
    """Return the named metrics: the mean squared error, and Pearson's correlation.

    The correlation is 0 where one of both does not vary.
    """
    p, a = np.asarray(predicted, float), np.asarray(actual, float)
    spread = float(p.std() * a.std())
    covariance = float(np.mean((p - p.mean()) * (a - a.mean())))
    known = {
        "mse": float(np.mean((p - a) ** 2)),
        "pearson": covariance / spread if spread > 0 else 0.0,
    }
    return {name: known[name] for name in names}
