"""Reads and writes the 8-bit block-quantised optimizer states of bitsandbytes.

Needs the tensors only, not the package: x[j] = code_map[codes[j]] * absmax[j // 256].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # entries that share one absmax; fixed in bitsandbytes' blockwise optimizers


def dequantised(codes: Tensor, absmax: Tensor, code_map: Tensor) -> Tensor:
    """Return the values behind the codes, code_map[codes] * absmax of the block.

    Args:
        codes: uint8, any shape of k entries.
        absmax: fp32 (ceil(k / 256),), largest magnitude of each block.
        code_map: fp32 (256,), ascending, within [-1, 1].

    Returns:
        fp32, shape of codes.
    """
    values = code_map.index_select(0, codes.reshape(-1).int())
    return (values * _per_entry(absmax, codes.numel())).view(codes.shape)


def requantise_(codes: Tensor, absmax: Tensor, code_map: Tensor, values: Tensor) -> None:
    """Write values into codes and absmax: absmax = max |x| of the block, code = nearest in the map.

    A block whose values are what its codes already say is left as it is, bit for bit: the map
    has no -1, so that a second rounding would shrink a block led by a negative value.

    Args:
        codes: uint8, any shape of k entries; written.
        absmax: fp32 (ceil(k / 256),); written.
        code_map: fp32 (256,), ascending, within [-1, 1].
        values: fp32, k entries.
    """
    flat = values.reshape(-1)
    if not flat.numel():
        return
    changed = _blocks(flat != dequantised(codes, absmax, code_map).reshape(-1)).any(dim=1)
    fresh_absmax = _blocks(flat.abs()).amax(dim=1)
    scale = _per_entry(fresh_absmax, flat.numel())
    relative = flat / torch.where(scale > 0, scale, torch.ones_like(scale))
    middles = (code_map[1:] + code_map[:-1]) / 2
    fresh_codes = torch.bucketize(relative, middles).to(torch.uint8)
    in_changed = _per_entry(changed, flat.numel())
    codes.copy_(torch.where(in_changed, fresh_codes, codes.reshape(-1)).view(codes.shape))
    absmax.copy_(torch.where(changed, fresh_absmax, absmax))


def _blocks(flat: Tensor) -> Tensor:
    return pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _per_entry(per_block: Tensor, k: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK)[:k]
