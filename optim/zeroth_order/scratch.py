"""Memory that displaced weights live in while their module runs."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line


class Scratch:
    """A buffer handed out from its start, and given back from its end.

    What does not fit, as when a module that holds weights runs inside another one, gets memory of
    its own, which lives as long as it is used.

    Args:
        capacity: bytes; `size_of` says what tensors take.
        device: where it lies.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._top = 0

    def mark(self) -> int:
        """Return what `release` needs to give back all that is taken from here on."""
        return self._top

    def take(self, like: Tensor) -> Tensor:
        """Return an uninitialised tensor of the shape, dtype and layout of another one."""
        size = size_of(like)
        if self._top + size > self._buffer.numel() or like.device != self._buffer.device:
            return torch.empty_like(like)
        piece = self._buffer[self._top : self._top + like.numel() * like.element_size()]
        self._top += size
        piece = piece.view(like.dtype)
        if like.is_contiguous():
            return piece.view(like.shape)
        # a kernel for another layout would round otherwise
        return piece.as_strided(like.shape, torch.empty_like(like, device="meta").stride())

    def release(self, mark: int) -> None:
        """Give back what was taken after the mark."""
        self._top = mark


def size_of(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes, with those up to the next aligned start."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
