"""What zeroth-order training may lower besides the loss: objectives without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.labels import IGNORED, bare, has_decoder, predicts_next


def error_rate(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return one minus the accuracy over all labels, in [0, 1]."""
    predicted, wanted = predictions(model, inputs)
    return 1 - (predicted == wanted).float().mean()


def f1_error(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return one minus the F1 score, averaged over the classes that occur, in [0, 1].

    F1 = 2 TP / (2 TP + FP + FN) for each class that is wanted or predicted at least once.
    """
    predicted, wanted = predictions(model, inputs)
    classes, indices = torch.unique(torch.cat([predicted, wanted]), return_inverse=True)
    found, due = indices[: len(predicted)], indices[len(predicted) :]
    count = len(classes)
    right = torch.bincount(due[found == due], minlength=count)
    total = torch.bincount(found, minlength=count) + torch.bincount(due, minlength=count)
    return 1 - (2 * right / total).mean()


def predictions(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the most likely class and the label of everything that has one.

    Args:
        model: returns `logits`: (batch, classes), or (batch, length, classes). Those of a causal
            language model at a position predict the label of the next one.
        inputs: with `labels`, (batch,) or (batch, length); -100 marks none.

    Returns:
        two tensors (n,).

    Raises:
        ValueError: the batch has no labels, or not of that shape.
    """
    labels, base = inputs.get("labels"), bare(model)
    # an encoder-decoder makes what its decoder reads from the labels
    rest = inputs if has_decoder(base) else {k: v for k, v in inputs.items() if k != "labels"}
    logits = model(**rest).logits
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        found = "no labels" if labels is None else f"labels {tuple(labels.shape)}, {labels.dtype}"
        raise ValueError(
            f"objective: got {found} for logits {tuple(logits.shape)}; accuracy and f1 need a "
            "class for each, use a function (model, inputs) -> number for anything else"
        )
    if predicts_next(base):
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = labels != IGNORED
    return logits[wanted].argmax(-1), labels[wanted]


NAMED = {"accuracy": error_rate, "f1": f1_error}
