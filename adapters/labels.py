"""Which label a model's loss compares with what it says at a position."""

from __future__ import annotations

from typing import Any

from torch import Tensor

IGNORED = -100
# losses of models that predict the next token, unless an encoder comes before their decoder
CAUSAL = ("ForCausalLM", "ForConditionalGeneration")
UNSHIFTED = ("XLNet", "XLM", "Flaubert")  # whose labels are those of the very position


def bare(model: Any) -> Any:
    """Return the model below wrappers."""
    while hasattr(model, "get_base_model") or hasattr(model, "module"):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    return model


def has_decoder(model: Any) -> bool:
    """Whether a bare model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicts_next(model: Any) -> bool:
    """Whether a bare model's loss compares a position with the next label, by the name it has."""
    kind = getattr(model, "loss_type", None)
    if kind is None:  # such as GPT2LMHeadModel
        name = type(model).__name__
        return name.endswith("LMHeadModel") and not name.startswith(UNSHIFTED)
    return kind in CAUSAL and not has_decoder(model)


def count_labels(model: Any, labels: Tensor) -> int:
    """Return over how many labels the model's loss is a mean.

    Args:
        model: wrapped or not.
        labels: (batch,) or (batch, length); -100 marks none.
    """
    counted = labels[:, 1:] if labels.dim() > 1 and predicts_next(bare(model)) else labels
    return int((counted != IGNORED).sum())
