"""Brings parameters of very different sizes to steps of about one size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def buckets(params: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Gather small parameters of one device and dtype, cut large ones, up to a bucket's size.

    Args:
        params: for each parameter its tensors of one shape, value and gradient first.

    Yields:
        Lists of the same form, over flat views. What cannot be viewed flat comes alone and as is.
    """
    waiting: dict[tuple[torch.device, torch.dtype, torch.dtype], list[list[Tensor]]] = {}
    for tensors in params:
        value, grad = tensors[:2]
        if not (value.is_contiguous() and grad.is_contiguous()):
            yield [tensors]
            continue
        limit = _ENTRIES.get(value.device.type, _ENTRIES_ELSEWHERE)
        flat = [tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in tensors]
        if value.numel() >= limit:
            cuts = range(0, value.numel(), limit)
            yield from ([[tensor[cut : cut + limit] for tensor in flat]] for cut in cuts)
            continue
        bucket = waiting.setdefault((value.device, value.dtype, grad.dtype), [])
        if sum(member[0].numel() for member in bucket) + value.numel() > limit:
            yield bucket[:]
            bucket.clear()
        bucket.append(flat)
    yield from waiting.values()


# On a CPU the dozen passes over a bucket stay in the L2 cache, measured best at 2^15 entries; a GPU
# wants few launches. Either bounds the temporaries of a large dense parameter.
_ENTRIES = {"cpu": 1 << 15}
_ENTRIES_ELSEWHERE = 1 << 22
