"""How right a classifier of texts, pairs of texts, or images is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sft.errors import UserError
from sft.evaluation.labels import label_metrics
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec


def measure(
    model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`.

    Args:
        model: a sequence or image classifier.
        processor: its tokenizer or image processor.
        rows: with `label`, a class or its name, and `text` [, `text_pair`] or `image`.
        format: "classification" or "image_classification".
        spec: the `evaluation:` section.
        longest: tokens kept of a text.
    """
    actual = [class_of(row["label"], model.config) for row in rows]
    predicted = predict(model, batches(processor, rows, format, spec.batch_size, longest))
    return label_metrics(predicted, actual, spec.metrics or ())


@torch.no_grad()
def predict(model: Any, inputs: Iterator[Mapping[str, Tensor]]) -> list[int]:
    """Return the likeliest class of each row of each batch."""
    found: list[int] = []
    with evaluating(model):
        for batch in inputs:
            placed = {key: value.to(model.device) for key, value in batch.items()}
            found += model(**placed).logits.argmax(-1).tolist()
    return found


def batches(
    processor: Any, rows: Any, format: str, size: int, longest: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yield model inputs of rows, in order, without their labels."""
    for start in range(0, len(rows), size):
        part = [rows[i] for i in range(start, min(start + size, len(rows)))]
        if format == "image_classification":
            images = [row["image"].convert("RGB") for row in part]
            yield processor(images=images, return_tensors="pt")
        else:
            pairs = [row["text_pair"] for row in part] if "text_pair" in part[0] else None
            yield processor(
                [row["text"] for row in part], pairs, return_tensors="pt", padding=True,
                truncation=True, max_length=min(longest, processor.model_max_length),
            )  # fmt: skip


def class_of(label: Any, config: Any) -> int:
    """Return a class by its name or number; a name goes first, as in training.

    Raises:
        UserError: the model has no such class.
    """
    names = config.label2id or {}
    found = names.get(str(label), label if isinstance(label, int) else None)
    if found is None or not 0 <= int(found) < config.num_labels:
        known = ", ".join(map(str, list(names)[:10]))
        raise UserError(
            f"label: got {label!r}, allowed is one of {config.num_labels} classes ({known}); "
            "give the data that the model was trained for"
        )
    return int(found)
