"""The loss of training, with labels that are counted but not known."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sft.chunked_loss import causal_model, head_input, head_nll, tail_of
from sft.evaluation.log_probs import predicts_tokens
from sft.kernels.linear_cross_entropy import chunk_rows
from sft.plan.batch import Batch


def planned_loss(model: Any, batch: Batch, half: torch.dtype | None = None) -> Tensor:
    """Do what training does with a batch.

    Args:
        model: of fake tensors.
        batch: its shape.
        half: what autocast computes in, None without.
    """
    if predicts_tokens(model):
        loss = planned_nll(model, batch, half)
        if batch.reference != "none":  # read while the graph of the first is alive, as TRL does
            with torch.no_grad():
                planned_nll(model, batch, half)
        return loss
    with _autocast(half):
        logits = model(**inputs_of(model, batch)).logits
    rows = logits.float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.int64))


def inputs_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Return what a collator gives: ids, and a mask, which counts as one of padded rows; or pixels.

    A decoder is given as many ids as there are labels.
    """
    base = causal_model(model)
    config, shape = base.config, (batch.rows * batch.sequences, batch.length)
    if base.main_input_name == "pixel_values":
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros((batch.rows, config.num_channels, *sides))}
    found = _text(shape)
    if config.is_encoder_decoder:
        target = (batch.rows, max(1, batch.labels // batch.rows))
        found["decoder_input_ids"] = torch.zeros(target, dtype=torch.int64)
    return found


def _text(shape: tuple[int, int]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
    }


def planned_nll(model: Any, batch: Batch, half: torch.dtype | None = None) -> Tensor:
    """Do what `sft.chunked_loss.chunked_nll` does.

    Which positions have labels does not matter to the bytes, how many there are does.

    Args:
        model: of fake tensors.
        batch: its shape.
        half: what autocast computes in, None without.
    """
    base = causal_model(model)
    head = base.get_output_embeddings()
    with _autocast(half), head_input(head, positions=0) as read:
        model(**inputs_of(model, batch), use_cache=False)
    places = torch.zeros(batch.labels, dtype=torch.int64)
    vocabulary = base.config.get_text_config().vocab_size
    kept = read[0][:, :-1][places, places]
    with _autocast(half):
        total = head_nll(head, kept, places, tail_of(base.config), chunk_rows(vocabulary))
    return total / batch.labels


def _autocast(half: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if half is None else torch.autocast("cpu", dtype=half)
