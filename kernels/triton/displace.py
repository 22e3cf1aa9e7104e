"""`displace` and `noise` on a GPU: one launch a tensor, the noise drawn in registers."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft.kernels.cpu.displace import Item, coefficient
from sft.kernels.displace import Magnitude, Random
from sft.kernels.noise import LAYOUTS, MASK, NOISE, TILE, normal_table


def displace_on_device(
    items: Sequence[Item], draws: Sequence[tuple[int, float]], kind: str
) -> None:
    """Move tensors of one device. One that is not contiguous is copied there and back."""
    tables: dict[torch.dtype, Tensor] = {}
    for item in items:
        if not item.weight.numel():
            continue
        wide = torch.promote_types(item.weight.dtype, torch.float32)
        if wide not in tables:
            tables[wide] = _table(draws, kind, wide, item.weight.device)
        weight, out = item.weight.detach().contiguous(), item.out.detach()
        target = out if out.is_contiguous() else torch.empty_like(weight)
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            _launch(item._replace(weight=weight, out=target), tables[wide], kind, wide)
        if target is not out:
            out.copy_(target)


def noise_on_device(
    key: int, parameter: int, numel: int, kind: str, start: int, device: torch.device
) -> Tensor:
    """Return z as 0 - (-1 z)."""
    out = torch.zeros(numel, device=device)
    displace_on_device([Item(out, out, parameter, 0.0, None, start)], [(key, -1.0)], kind)
    return out


def _table(
    draws: Sequence[tuple[int, float]], kind: str, wide: torch.dtype, device: torch.device
) -> Tensor:
    """(draws, 2) int64: keys, and bits of the coefficients; the copy does not wait for the GPU."""
    used = [(key, coefficient(c, kind, wide)) for key, c in draws]
    rows = [[_signed(key), _bits(c)] for key, c in used if c]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 2)
    if device.type != "cpu" and rows:
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def _launch(item: Item, table: Tensor, kind: str, wide: torch.dtype) -> None:
    first, last = item.start // TILE, -(-(item.start + item.weight.numel()) // TILE)
    name, mask_key, limit = _mask(item, wide)
    _kernel(item.weight.device)[(last - first,)](
        item.out,
        item.weight,
        table,
        _normals(item.weight.device) if kind == "gaussian_table" else None,
        item.weight.numel(),
        item.start,
        _signed(item.parameter, 32),
        len(table),
        _bits(item.decay if wide == torch.float64 else float(np.float32(item.decay))),
        mask_key,
        limit,
        KIND=kind,
        MASK=name,
        DECAYS=bool(item.decay),
        DOUBLE=wide == torch.float64,
        BITS=LAYOUTS[kind].bits,
        TILE=TILE,
        NOISE_STREAM=NOISE,
        MASK_STREAM=MASK,
        # signs take few counters, which every warp draws for itself; normals take registers
        num_warps={"rademacher": 4, "gaussian_table": 8, "gaussian": 16}[kind],
        # decay * w is rounded before it is added, as on the CPU
        enable_fp_fusion=False,
    )


def _mask(item: Item, wide: torch.dtype) -> tuple[str, int, int]:
    """Return the kind of a mask, its key, and its limit: bits of a magnitude, or 16 random bits."""
    if isinstance(item.mask, Random):
        return "random", _signed(item.mask.key), item.mask.limit
    if isinstance(item.mask, Magnitude):
        return "magnitude", 0, _bits(_at_most(item.mask.threshold, wide))
    return "none", 0, 0


def _at_most(threshold: float, wide: torch.dtype) -> float:
    """Return the largest number of the dtype up to a threshold: |w| is compared in that dtype."""
    if wide == torch.float64:
        return threshold
    number = np.float32(threshold)
    return float(np.nextafter(number, np.float32(0)) if float(number) > threshold else number)


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _signed(number: int, bits: int = 64) -> int:
    half = 1 << bits - 1
    return (number + half) % (2 * half) - half


@functools.cache
def _normals(device: torch.device) -> Tensor:
    """(65536,) bfloat16, which holds the table's 8 bits: half of the cache."""
    return normal_table().to(torch.bfloat16).to(device)


def _kernel(device: torch.device) -> Any:
    try:
        from sft.kernels.triton.kernel import displace_kernel
    except ImportError as error:
        raise ImportError(
            f"triton: not installed, and weights on {device} are moved by it; "
            "pip install 'sparse-sft[triton]' on Linux, or train on the CPU"
        ) from error
    return displace_kernel
