"""Supports: the sets of trained positions, checked, hashed and tied to their base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from sft.kernels.pattern import index_dtype

# Entries of a weight that its fingerprint reads.
FINGERPRINT_SAMPLE = 256
# A prime: a step of numel / 256 is a multiple of most rows' lengths, would read one column over and
# over, and miss that others were trained.
_STRIDE = 2_654_435_761
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


def check_values(values: Tensor, wanted: tuple[int, ...], where: str, weight: object) -> None:
    """Raise unless trained values read from a file have the wanted shape and a float dtype.

    Args:
        values: as read.
        wanted: the shape that adapter_config.json gives.
        where: names the file entry in the message.
        weight: the shape of the weight, for the message.

    Raises:
        ValueError: another shape or kind.
    """
    check_shape(values, wanted, where, weight)
    if not values.is_floating_point():
        raise ValueError(f"{where} is {values.dtype}, allowed are float dtypes")


def check_shape(tensor: Tensor, wanted: tuple[int, ...], where: str, weight: object) -> None:
    """Raise unless a tensor of a file has the wanted shape."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{where} holds {tuple(tensor.shape)} entries, its "
            f"adapter_config.json gives {wanted} for a weight of {weight}"
        )


def check_base(made_for: Tensor, weight: Tensor, module: str, part: str) -> None:
    """Raise unless an adapter file was made for this base weight.

    Args:
        made_for: the fingerprint in the file, one int64.
        weight: the base weight.
        module: names it in messages.
        part: names the file entry.

    Raises:
        ValueError: not a fingerprint, or that of another weight.
    """
    if made_for.dtype != torch.int64 or made_for.numel() != 1:
        raise ValueError(
            f"{module}.{part} holds {made_for.dtype} {tuple(made_for.shape)}, allowed is "
            "one torch.int64; the file is damaged"
        )
    wanted, found = int(made_for), fingerprint(weight)
    if wanted and found and wanted != found:
        raise ValueError(
            f"{module} was trained on another base weight of shape {tuple(weight.shape)} "
            f"(fingerprint {wanted:016x}, this base has {found:016x}); load it on its own base"
        )


def as_indices(positions: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return positions in the dtype and on the device that a layer keeps them."""
    return positions.to(device=device, dtype=index_dtype(shape[0] * shape[1]))


def fingerprint(weight: Tensor) -> int:
    """Return a 63-bit checksum of a weight's shape and of entries spread over it.

    Entries are rounded to bfloat16 first, so that one checkpoint loaded in float32 or bfloat16
    counts as the same base. Float16 rounds otherwise (its small numbers lose bits that bfloat16
    keeps), so these weights, quantised and meta ones give 0, which matches anything.
    """
    if weight.dtype not in _FINGERPRINTED or weight.is_meta or weight.numel() == 0:
        return 0
    count = min(FINGERPRINT_SAMPLE, weight.numel())
    positions = torch.arange(count, device=weight.device) * _STRIDE % weight.numel()
    sample = weight.detach().reshape(-1)[positions]
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
