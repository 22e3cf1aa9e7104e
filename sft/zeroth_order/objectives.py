"""What zeroth-order training may lower besides the loss: objectives without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
# losses of models that predict the next token, unless an encoder comes before their decoder
CAUSAL = ("ForCausalLM", "ForConditionalGeneration")
UNSHIFTED = ("XLNet", "XLM", "Flaubert")  # whose labels are those of the very position


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
    labels, base = inputs.get("labels"), _base(model)
    # an encoder-decoder makes what its decoder reads from the labels
    rest = inputs if _has_decoder(base) else {k: v for k, v in inputs.items() if k != "labels"}
    logits = model(**rest).logits
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        found = "no labels" if labels is None else f"labels {tuple(labels.shape)}, {labels.dtype}"
        raise ValueError(
            f"objective: got {found} for logits {tuple(logits.shape)}; accuracy and f1 need a "
            "class for each, use a function (model, inputs) -> number for anything else"
        )
    if _is_causal(base):
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = labels != IGNORED
    return logits[wanted].argmax(-1), labels[wanted]


def _base(model: nn.Module) -> Any:
    """Return the model below wrappers."""
    base: Any = model
    while hasattr(base, "get_base_model") or hasattr(base, "module"):
        base = base.get_base_model() if hasattr(base, "get_base_model") else base.module
    return base


def _has_decoder(base: Any) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def _is_causal(base: Any) -> bool:
    """Whether the model's loss compares a position with the next label, by the name it goes by."""
    kind = getattr(base, "loss_type", None)
    if kind is None:  # such as GPT2LMHeadModel
        name = type(base).__name__
        return name.endswith("LMHeadModel") and not name.startswith(UNSHIFTED)
    return kind in CAUSAL and not _has_decoder(base)


NAMED = {"accuracy": error_rate, "f1": f1_error}
