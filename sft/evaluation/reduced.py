"""A next-token distribution in little: its likeliest tokens, and all others as one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 1024  # tokens of a distribution
_LEAST = 1e-9  # mass that float32 logits do not tell from none


class Reduced(NamedTuple):
    """Distributions of n positions: 8 bytes for each kept token."""

    tokens: Tensor  # (n, k) int32
    log_probs: Tensor  # (n, k) float32


def reduce(log_probs: Tensor, kept: int = KEPT) -> Reduced:
    """Keep the likeliest tokens of each distribution.

    Args:
        log_probs: (n, vocabulary).
        kept: how many, at most.
    """
    found = log_probs.topk(min(kept, log_probs.shape[-1]))
    return Reduced(found.indices.to(torch.int32).cpu(), found.values.float().cpu())


def divergence(base: Reduced, log_probs: Tensor) -> Tensor:
    """Return KL(base || model) of each position, the tokens that were not kept taken as one.

    sum_kept p (log p - log q) + p_rest (log p_rest - log q_rest), which is at most the divergence
    of the whole distributions, and equal to it where their tails are alike.

    Args:
        base: of n positions.
        log_probs: (n, vocabulary), of the model there.

    Returns:
        (n,) float64, on the CPU.
    """
    tokens = base.tokens.to(log_probs.device, torch.int64)
    log_q = log_probs.gather(1, tokens).double().cpu()
    log_p = base.log_probs.double()
    p, q = log_p.exp(), log_q.exp()
    p_rest, q_rest = (1 - p.sum(1)).clamp(min=_LEAST), (1 - q.sum(1)).clamp(min=_LEAST)
    return (p * (log_p - log_q)).sum(1) + p_rest * (p_rest.log() - q_rest.log())
