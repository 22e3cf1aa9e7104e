"""The loss of training, with labels that are counted but not known."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sft.chunked_loss import causal_model, head_input, head_nll, tail_of
from sft.kernels.linear_cross_entropy import chunk_rows
from sft.plan.batch import Batch


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """Return what a collator gives: ids, and a mask, which counts as one of padded rows."""
    shape = (batch.rows, batch.length)
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
        model(**inputs_of(batch), use_cache=False)
    places = torch.zeros(batch.labels, dtype=torch.int64)
    vocabulary = base.config.get_text_config().vocab_size
    kept = read[0][:, :-1][places, places]
    with _autocast(half):
        total = head_nll(head, kept, places, tail_of(base.config), chunk_rows(vocabulary))
    return total / batch.labels


def _autocast(half: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if half is None else torch.autocast("cpu", dtype=half)
