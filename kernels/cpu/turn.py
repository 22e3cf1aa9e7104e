"""Transposition on a CPU: the operands of dot products along tokens."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Tokens that are copied side by side: a cache line of float32.
LINE = 16
# Tokens of a chunk whose rows are moved apart first, and by how many entries.
CHUNK, APART = 64, 48
# Rows at multiples of so many bytes share a few sets of a first-level cache, and evict each other.
ALIASED = 1024
# Buffers up to this size are kept: to ask for memory anew at each layer costs page faults.
KEPT_BYTES = 16 * 2**20


def turn(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return (tokens, n) as a contiguous (n, tokens); a third to a half of `x.t().contiguous()`.

    Args:
        x: any strides.
        out: (n, tokens), contiguous, in the dtype of x; by default a new tensor.
    """
    tokens, n = x.shape
    out = x.new_empty(n, tokens) if out is None else out
    whole = tokens - tokens % LINE
    if isinstance(x, FakeTensor):  # shapes alone have nothing to gain from chunks
        return out
    if x.stride(0) * x.element_size() % ALIASED:
        _turn_lines(x[:whole], out[:, :whole])
    else:
        apart = x.new_empty(CHUNK, n + APART)[:, :n]
        for start in range(0, whole, CHUNK):
            chunk = x[start : min(start + CHUNK, whole)]
            moved = apart[: len(chunk)].copy_(chunk)
            _turn_lines(moved, out[:, start : start + len(chunk)])
    out[:, whole:].copy_(x[whole:].t())
    return out


def turned(x: Tensor, slot: str) -> Tensor:
    """Return x.t() for a product, (n, tokens) contiguous, in memory of this thread's slot.

    It holds until the slot is asked for again. What has its tokens side by side comes as it is.
    """
    if x.stride(0) == 1:
        return x.t()
    tokens, n = x.shape
    if x.numel() * x.element_size() > KEPT_BYTES:
        return turn(x)
    return turn(x, _kept.take(slot, x, tokens * n).view(n, tokens))


def _turn_lines(x: Tensor, out: Tensor) -> None:
    tokens = (len(x) // LINE, LINE)
    lines = x.unflatten(0, tokens).permute(2, 0, 1)  # type: ignore[no-untyped-call]
    out.unflatten(1, tokens).copy_(lines)  # type: ignore[no-untyped-call]


class _Kept(threading.local):
    """One buffer a slot and dtype, as large as the largest so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, slot: str, like: Tensor, numel: int) -> Tensor:
        """Return (numel,), whatever it holds."""
        found = self._buffers.get((slot, like.dtype))
        if found is None or found.numel() < numel:
            # what inference mode makes could never be written to outside of it
            with torch.inference_mode(False):
                found = torch.empty(numel, dtype=like.dtype)
            self._buffers[slot, like.dtype] = found
        return found[:numel]


_kept = _Kept()
