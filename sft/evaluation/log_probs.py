"""What a language model says of the next token, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sft.chunked_loss import (
    UnknownLogits,
    autocast_as,
    causal_model,
    compare_logits,
    head_input,
    tail_of,
)
from sft.kernels.linear_cross_entropy import apply_tail, chunk_rows


def predicts_tokens(model: Any) -> bool:
    """Tell whether a model says what comes next: whether it is a causal language model."""
    base = causal_model(model)
    generates = hasattr(base, "can_generate") and base.can_generate()
    return generates and not getattr(base.config, "is_encoder_decoder", False)


@torch.no_grad()
def log_probs(
    model: Any, inputs: dict[str, Tensor], wanted: Tensor, rows: int | None = None
) -> Iterator[Tensor]:
    """Yield log p(next token | tokens up to here) of the wanted positions, in their order.

    The head multiplies some positions at a time, so logits are never whole in memory. Of a model
    that does something unknown to its logits they are: its own are taken.

    Args:
        model: a causal language model, wrapped or not, in eval mode.
        inputs: of the model, each (batch, length).
        wanted: (batch, length) bool.
        rows: positions a chunk; by default a rule of the vocabulary.

    Yields:
        (n, vocabulary) float32.
    """
    base = causal_model(model)
    size = rows or chunk_rows(base.config.get_text_config().vocab_size)
    head, tail = base.get_output_embeddings(), tail_of(base.config)
    halves: list[torch.dtype] = []
    with head_input(head, positions=1, halves=halves) as read:
        logits = model(**inputs, use_cache=False).logits
    try:
        if len(read) != 1 or read[0].dim() != 3 or read[0].shape[1] < wanted.shape[1]:
            raise UnknownLogits("its head reads something else than one row a position")
        with autocast_as(read[0], halves):
            compare_logits(head, read[0][:, :1], logits, tail, type(base).__name__)
    except UnknownLogits:
        for chunk in _chunks(model(**inputs).logits, wanted, size):
            yield chunk.float().log_softmax(-1)
        return
    for chunk in _chunks(read[0], wanted, size):
        with autocast_as(chunk, halves):
            made = head(chunk.unsqueeze(0))[0]
        yield apply_tail(made, tail).float().log_softmax(-1)


@torch.no_grad()
def token_log_probs(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return log p(label) of every label, 0 where there is none.

    Args:
        model: as for `log_probs`.
        inputs: of the model.
        labels: (batch, length), -100 for none; each is predicted from the tokens before it.

    Returns:
        (batch, length) float32; nothing precedes the first column: it is 0.
    """
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    targets = labels[:, 1:][wanted[:, :-1]]
    found, start = [], 0
    for chunk in log_probs(model, inputs, wanted):
        part = targets[start : start + len(chunk), None].to(chunk.device)
        found.append(chunk.gather(1, part)[:, 0])
        start += len(chunk)
    result = torch.zeros(labels.shape, device=labels.device)
    if found:
        result[:, 1:][wanted[:, :-1]] = torch.cat(found).to(labels.device)
    return result


def _chunks(tensor: Tensor, wanted: Tensor, rows: int) -> Iterator[Tensor]:
    """Pick the wanted rows of (batch, length, n); a trained prompt may stand before them."""
    picked = tensor[:, -wanted.shape[1] :][wanted.to(tensor.device)]
    for start in range(0, len(picked), rows):
        yield picked[start : start + rows]
