"""Supports: the sets of trained positions, checked, hashed and tied to their base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from sft.kernels.pattern import index_dtype

# Entries of a weight that its fingerprint reads.
FINGERPRINT_SAMPLE = 256
_FINGERPRINTED = (torch.bfloat16, torch.float32, torch.float64)


def check_indices(indices: Tensor, shape: tuple[int, int], where: str) -> None:
    """Raise unless `indices` is a support of a matrix of this shape.

    Args:
        indices: (k,) flat positions, as read from a file.
        shape: (rows, cols).
        where: names the file entry in the message.

    Raises:
        ValueError: wrong dtype, out of range, or not strictly ascending.
    """
    numel = shape[0] * shape[1]
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(
            f"{where}: got {indices.dtype} of {indices.dim()} dimensions, "
            "allowed is one dimension of int32 or int64"
        )
    if indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= numel:
        raise ValueError(f"{where}: position {low if low < 0 else high} is outside [0, {numel})")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"{where}: positions must be strictly ascending; the file is damaged")


def as_indices(positions: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return positions in the dtype and on the device that a layer keeps them."""
    return positions.to(device=device, dtype=index_dtype(shape[0] * shape[1]))


def fingerprint(weight: Tensor) -> int:
    """Return a 63-bit checksum of a weight's shape and of evenly spaced entries.

    Entries are rounded to bfloat16 first, so that one checkpoint loaded in float32 or bfloat16
    counts as the same base. Float16 rounds otherwise (its small numbers lose bits that bfloat16
    keeps), so these weights, quantised and meta ones give 0, which matches anything.
    """
    if weight.dtype not in _FINGERPRINTED or weight.is_meta or weight.numel() == 0:
        return 0
    step = max(1, weight.numel() // FINGERPRINT_SAMPLE)
    sample = weight.detach().reshape(-1)[::step][:FINGERPRINT_SAMPLE]
    content = sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode() + content).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def support_hash(supports: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named supports, independent of order, device and index width."""
    digest = hashlib.sha256()
    for name, indices in sorted(supports, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(indices.detach().to("cpu", torch.int64).numpy().tobytes())
    return digest.hexdigest()
