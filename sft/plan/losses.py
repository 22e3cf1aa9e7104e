"""The losses of training, with labels that are counted but not known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sft.plan.batch import Batch


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """Return what a collator gives: ids and mask."""
    shape = (batch.rows, batch.length)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
    }


def labelled_nll(model: Any, batch: Batch) -> Tensor:
    """Do what `sft.supervised.labelled_nll` does.

    Which positions have labels does not matter to the bytes, how many there are does.
    """
    columns = torch.arange(batch.columns)
    logits = model(**inputs_of(batch), use_cache=False, logits_to_keep=columns).logits
    places = torch.zeros(batch.labels, dtype=torch.int64)
    wanted = logits[places, places]
    return functional.cross_entropy(wanted.float(), places, reduction="sum") / batch.labels
