"""Positions in a file: 2 + log2(numel / k) bits each, exact, read in one pass."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sft.adapters.layer import SparseLayer, sparse_layers
from sft.kernels.pattern import index_dtype


def pack_supports(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors with the positions of single weights packed.

    Args:
        model: holds the layers.
        adapter: its name.
        tensors: by key of the model's state dict.
    """
    packed = dict(tensors)
    for key, layer in _places(model, adapter).items():
        indices = packed.get(key)
        if indices is not None and indices.dtype != torch.uint8 and not indices.is_meta:
            # (1, n), a shape that no positions have: who does not unpack it can't take it for them
            packed[key] = pack(indices, layer.shape[0] * layer.shape[1]).unsqueeze(0)
    return packed


def unpack_supports(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a file with packed positions as indices; others are left alone.

    Raises:
        ValueError: packed for another number of positions, or damaged.
    """
    found = dict(tensors)
    for key, layer in _places(model, adapter).items():
        if key in found and found[key].dtype == torch.uint8:
            where = f"adapter file: {key.removesuffix(f'.{adapter}')}"
            count = layer.support(adapter).numel()
            found[key] = unpack(found[key], count, layer.shape[0] * layer.shape[1], where)
    return found


def _places(model: nn.Module, adapter: str) -> dict[str, SparseLayer]:
    """Return the layers of an adapter that trains single weights, by the keys of its positions."""
    return {
        f"{name}.{part}.{adapter}": layer
        for name, layer in sparse_layers(model).items()
        if adapter in layer.trained_values and layer.pattern(adapter) is not None
        for part in layer.other_param_names
        if part.endswith("_indices")
    }


def pack(indices: Tensor, numel: int) -> Tensor:
    """Return sorted unique positions as bytes.

    Of each position the lowest l = floor(log2(numel / k)) bits are stored as they are, one after
    another; the numbers h above them, which never fall, as a bit vector with ones at h_j + j.

    Args:
        indices: (k,) ascending, in [0, numel).
        numel: of the weight.

    Returns:
        (n,) uint8 on the CPU.

    Paper: Elias, Efficient storage and retrieval by content and address of static files (1974).
    """
    low_bits, size = _layout(len(indices), numel)
    flat = indices.cpu().numpy().astype(np.int64)
    if not len(flat):
        return torch.empty(0, dtype=torch.uint8)
    above = np.zeros(size, np.uint8)
    above[(flat >> low_bits) + np.arange(len(flat))] = 1
    low = _bits(flat & ((1 << low_bits) - 1), low_bits)
    return torch.from_numpy(np.concatenate([np.packbits(low), np.packbits(above)]))


def unpack(packed: Tensor, count: int, numel: int, where: str) -> Tensor:
    """Return the positions that `pack` gave the bytes of.

    Args:
        packed: (n,) uint8.
        count: k.
        numel: of the weight.
        where: names the file entry in the message.

    Returns:
        (k,) int32, or int64 from 2^31 weights.

    Raises:
        ValueError: not so many positions of such a weight.
    """
    low_bits, size = _layout(count, numel)
    edge = -(-count * low_bits // 8)
    data = packed.cpu().numpy().reshape(-1)
    if len(data) != edge + -(-size // 8):
        raise ValueError(
            f"{where} holds {packed.numel()} bytes, the {count} positions that its "
            f"adapter_config.json gives take {edge + -(-size // 8)}"
        )
    above = np.flatnonzero(np.unpackbits(data[edge:])[:size])
    if len(above) != count:
        raise ValueError(f"{where} holds {len(above)} positions, not {count}; the file is damaged")
    low = np.unpackbits(data[:edge])[: count * low_bits].reshape(count, low_bits)
    found = torch.from_numpy((above - np.arange(count) << low_bits) + _numbers(low))
    return found.to(index_dtype(numel))


def _layout(count: int, numel: int) -> tuple[int, int]:
    """Return how many bits of a position are stored as they are, and the bits of the rest."""
    low_bits = max(0, (numel // count).bit_length() - 1) if count else 0
    return low_bits, count + (numel >> low_bits) + 1 if count else 0


def _bits(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """(k, width): the lowest bits of each number, the highest of them first."""
    # as bytes from the highest to the lowest
    octets = numbers.astype(">i8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets[:, 8 - -(-width // 8) :], axis=1)[:, -(-width // 8) * 8 - width :]


def _numbers(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(k,): the inverse of `_bits`."""
    count, width = bits.shape
    octets = np.zeros((count, 8), np.uint8)
    held = -(-width // 8)
    if held:
        padded = np.pad(bits, ((0, 0), (held * 8 - width, 0)))
        octets[:, 8 - held :] = np.packbits(padded, axis=1)
    return octets.view(">i8").reshape(-1).astype(np.int64)
