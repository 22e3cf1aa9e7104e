"""How likely a model finds the right completions: `nll` and `perplexity`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sft.data.encode import Encoded
from sft.evaluation.batches import IGNORED, by_length, right_padded
from sft.evaluation.log_probs import token_log_probs

NAMES = ("nll", "perplexity")


def completion_nll(model: Any, examples: Sequence[Encoded], batch_size: int, pad: int) -> float:
    """Return the mean negative log-likelihood of a completion token, in nats.

    Args:
        model: a causal language model, in eval mode.
        examples: the tokens of a completion that stand first in an example are not predicted.
        batch_size: examples at a time.
        pad: id of the padding token.
    """
    found = completion_log_probs(model, examples, batch_size, pad)
    return -sum(total for total, _ in found) / max(sum(count for _, count in found), 1)


def perplexity(nll: float) -> float:
    """Return exp(nll), the number of equally likely tokens that would be as hard to guess."""
    return math.exp(min(nll, 700.0))  # float64 ends soon after


def completion_log_probs(
    model: Any, examples: Sequence[Encoded], batch_size: int, pad: int
) -> list[tuple[float, int]]:
    """Return log p(completion | prompt) of each example, and of how many tokens it is the sum."""
    found = [(0.0, 0)] * len(examples)
    for batch in by_length(examples, batch_size):
        inputs, labels = right_padded([examples[i] for i in batch], pad, model.device)
        sums = token_log_probs(model, inputs, labels).double().sum(1).tolist()
        counts = (labels[:, 1:] != IGNORED).sum(1).tolist()
        for i, total, count in zip(batch, sums, counts, strict=True):
            found[i] = total, count
    return found
