"""Encoded examples in batches: right-padded to be judged, left-padded to be continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sft.data.encode import Encoded

IGNORED = -100


def held_out_batches(
    examples: Sequence[Encoded], batch_size: int, pad: int, device: Any, count: int
) -> list[dict[str, Tensor]]:
    """Return the inputs of the first few batches, for comparing two models' logits."""
    batches = list(by_length(examples, batch_size))[:count]
    return [right_padded([examples[i] for i in batch], pad, device)[0] for batch in batches]


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Yield positions in batches, longest prompts first, ties in order."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def right_padded(
    batch: Sequence[Encoded], pad: int, device: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Stack prompt + completion; labels are -100 on the prompt and on padding."""
    rows = [torch.tensor(example.prompt + example.completion) for example in batch]
    labels = [
        torch.tensor([IGNORED] * len(example.prompt) + example.completion) for example in batch
    ]
    stack = torch.nn.utils.rnn.pad_sequence
    ids = stack(rows, batch_first=True, padding_value=pad)
    mask = stack([torch.ones_like(row) for row in rows], batch_first=True)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return inputs, stack(labels, batch_first=True, padding_value=IGNORED).to(device)


def left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Stack prompts so that all of them end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
