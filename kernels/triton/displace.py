"""`displace` and `noise` on a GPU: one launch for all tensors, the noise drawn in registers."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.cpu.displace import coefficient
from sft.kernels.mask import MAGNITUDE, NONE, RANDOM, Random, at_most
from sft.kernels.noise import LAYOUTS, MASK, NOISE, TILE, normal_table, signed
from sft.kernels.triton.noise import fields, normals, scaled
from sft.kernels.triton.table import TYPES, address, place, sent, table

# Normals take registers. Signs take few counters, which every warp draws for itself: less work
# with fewer warps, but more registers.
WARPS = {"rademacher": 8, "gaussian_table": 8, "gaussian": 16}


def displace_(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    parameters: Sequence[int],
    starts: Sequence[int],
    decays: Sequence[float],
    masks: Sequence[int],
    mask_keys: Sequence[int],
    limits: Sequence[float],
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: str,
) -> None:
    """Launch `sft.kernels.displace.displace`."""
    numbers = parameters, starts, decays, masks, mask_keys, limits
    _move(weights, out, (), *numbers, [(keys, coefficients)], kind)


def displace_twice_(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    ahead: Sequence[Tensor],
    parameters: Sequence[int],
    decays: Sequence[float],
    masks: Sequence[int],
    mask_keys: Sequence[int],
    limits: Sequence[float],
    keys: Sequence[int],
    coefficients: Sequence[float],
    then_keys: Sequence[int],
    then_coefficients: Sequence[float],
    kind: str,
) -> None:
    """Launch `sft.kernels.displace_twice.displace_twice`."""
    numbers = parameters, [0] * len(weights), decays, masks, mask_keys, limits
    draws = [(keys, coefficients), (then_keys, then_coefficients)]
    _move(weights, out, ahead, *numbers, draws, kind)


def noise_(out: Tensor, key: int, parameter: int, start: int, kind: str) -> None:
    """Launch `sft.kernels.noise.noise`: z is 0 - (-1 z)."""
    out.zero_()
    numbers = [parameter], [start], [0.0], [NONE], [0], [0.0]
    _move([out], [out], (), *numbers, [([key], [-1.0])], kind)


def _move(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    ahead: Sequence[Tensor],
    parameters: Sequence[int],
    starts: Sequence[int],
    decays: Sequence[float],
    masks: Sequence[int],
    mask_keys: Sequence[int],
    limits: Sequence[float],
    draws: Sequence[tuple[Sequence[int], Sequence[float]]],
    kind: str,
) -> None:
    """Launch once for all tensors of one dtype and kind of mask.

    What is not contiguous is copied there and back.
    """
    groups: dict[tuple[torch.dtype, int], list[int]] = {}
    for i, weight in enumerate(weights):
        if weight.numel():
            groups.setdefault((weight.dtype, masks[i]), []).append(i)
    for (dtype, mask), chosen in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        read = [weights[i].detach().contiguous() for i in chosen]
        targets = [[there[i].detach() for i in chosen] for there in (out, ahead) if there]
        dense = [[_dense(t) for t in column] for column in targets]
        numbers = [
            [signed(parameters[i], 32) for i in chosen],
            [starts[i] for i in chosen],
            [bits(_held(decays[i], wide)) for i in chosen],
            [mask_keys[i] for i in chosen],
            [limit_bits(mask, limits[i], wide) for i in chosen],
        ]
        _launch(read, dense, numbers, mask, draws, kind, keep=bool(out))
        for column, there in zip(dense, targets, strict=True):
            for found, target in zip(column, there, strict=True):
                if found is not target:
                    target.copy_(found)


def _launch(
    read: list[Tensor],
    written: list[list[Tensor]],
    numbers: list[list[int]],
    mask: int,
    draws: Sequence[tuple[Sequence[int], Sequence[float]]],
    kind: str,
    *,
    keep: bool,
) -> None:
    device, wide = read[0].device, torch.promote_types(read[0].dtype, torch.float32)
    starts = numbers[1]
    # programs begin where tiles do, which may be before the tensor
    sizes = [start % TILE + w.numel() for start, w in zip(starts, read, strict=True)]
    rows = table([read, written[0], written[-1]], *numbers, sizes=sizes, block=TILE)
    given, counts = draws_on(device, draws, kind, wide)
    with torch.cuda.device_of(read[0]):  # type: ignore[no-untyped-call]
        displace_kernel[(len(rows.blocks),)](
            rows.rows,
            rows.blocks,
            given,
            normals_on(device) if kind == "gaussian_table" else None,
            counts[0],
            counts[-1],
            DTYPE=TYPES[read[0].dtype],
            WIDE=TYPES[wide],
            ALIGNED=rows.aligned and not any(start % 16 for start in starts),
            KIND=kind,
            MASK=mask,
            TWICE=len(draws) > 1,
            KEEP=keep,
            BITS=LAYOUTS[kind].bits,
            TILE=TILE,
            NOISE_STREAM=NOISE,
            MASK_STREAM=MASK,
            # two sums of normals and a mask fill the registers of half as many warps
            num_warps=8 if len(draws) > 1 and mask else WARPS[kind],
            # decay * w is rounded before it is added, as on the CPU
            enable_fp_fusion=False,
        )


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.new_empty(tensor.shape)


def draws_on(
    device: torch.device,
    draws: Sequence[tuple[Sequence[int], Sequence[float]]],
    kind: str,
    wide: torch.dtype,
) -> tuple[Tensor, list[int]]:
    """Return (draws, 2) int64 of keys and bits of coefficients, and how many each list has."""
    rows, counts = [], []
    for keys, coefficients in draws:
        used = [
            (key, coefficient(c, kind, wide)) for key, c in zip(keys, coefficients, strict=True)
        ]
        rows += [(key, bits(c)) for key, c in used if c]
        counts.append(sum(c != 0 for _, c in used))
    return sent(torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2), device), counts


def limit_bits(mask: int, limit: float, wide: torch.dtype) -> int:
    """Return a mask's bound as a kernel takes it: bits of a magnitude, or 16 random bits."""
    if mask == RANDOM:
        return Random(0, limit).limit
    return bits(at_most(limit, wide)) if mask == MAGNITUDE else 0


def _held(number: float, wide: torch.dtype) -> float:
    return number if wide == torch.float64 else float(np.float32(number))


def bits(number: float) -> int:
    """Return the bits of a float64; launchers pass floats in float32."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


@functools.cache
def normals_on(device: torch.device) -> Tensor:
    """(65536,) bfloat16, which holds the table's 8 bits: half of the cache."""
    return normal_table().to(torch.bfloat16).to(device)


@triton.jit(do_not_specialize=["count", "later"])
def displace_kernel(
    rows_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    draws_ptr: tl.tensor,
    normals_ptr: tl.tensor,
    count: tl.int32,
    later: tl.int32,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    MASK: tl.constexpr,
    TWICE: tl.constexpr,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    NOISE_STREAM: tl.constexpr,
    MASK_STREAM: tl.constexpr,
) -> None:
    """Store round(w - (c_1 z_1 + ... + c_n z_n + decay w)), one tile a program.

    With TWICE what is stored is moved again, by the draws from `count` on, in the same pass. A row
    of the table: weights up from the tile's start, weights, out, ahead, parameter, start, bits of
    the decay, key and limit of the mask. What is not moved keeps its bits.
    """
    ROWS: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = TILE // ROWS
    row, first, size = place(rows_ptr, blocks_ptr, 9, TILE)
    parameter = tl.load(row + 4).to(tl.int32)
    start = tl.load(row + 5)
    tile = start // TILE + first // TILE
    # the address of the tile's first weight, which may lie before the tensor's
    lead = start % TILE
    base = first - lead
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    weight_ptr = address(row, 1, DTYPE, ALIGNED) + base
    out_ptr = address(row, 2, DTYPE, ALIGNED) + base
    ahead_ptr = address(row, 3, DTYPE, ALIGNED) + base
    inside = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    low = tl.maximum(lead - first, 0).to(tl.int32)
    high = tl.minimum(size - first, TILE).to(tl.int32)
    here = (inside >= low) & (inside < high)
    # only tiles at the ends take a mask, which would break 128-bit loads
    whole = high - low == TILE
    if whole:
        stored = tl.load(weight_ptr + inside)
    else:
        stored = tl.load(weight_ptr + inside, mask=here, other=0.0)
    moved = _noises(
        draws_ptr, normals_ptr, 0, count, parameter, tile, WIDE, KIND, BITS, TILE, NOISE_STREAM
    )
    decay = tl.load(row + 6)
    if decay != 0:
        moved += stored.to(WIDE) * decay.to(tl.float64, bitcast=True).to(WIDE)
    chosen = _chosen(row, stored, parameter, tile, WIDE, MASK, ROWS, COLS, TILE, MASK_STREAM)
    new = tl.where(chosen, (stored.to(WIDE) - moved).to(DTYPE), stored)
    if KEEP:
        _store(out_ptr + inside, new, here, whole)
    if TWICE:
        moved = _noises(
            draws_ptr, normals_ptr, count, later, parameter, tile, WIDE, KIND, BITS, TILE,
            NOISE_STREAM,
        )  # fmt: skip
        chosen = _chosen(row, new, parameter, tile, WIDE, MASK, ROWS, COLS, TILE, MASK_STREAM)
        new = tl.where(chosen, (new.to(WIDE) - moved).to(DTYPE), new)
        _store(ahead_ptr + inside, new, here, whole)


@triton.jit
def _store(at: tl.tensor, new: tl.tensor, here: tl.tensor, whole: tl.tensor) -> None:
    if whole:
        tl.store(at, new)
    else:
        tl.store(at, new, mask=here)


@triton.jit
def _noises(
    draws_ptr: tl.tensor,
    normals_ptr: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    parameter: tl.tensor,
    tile: tl.tensor,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    STREAM: tl.constexpr,
) -> tl.tensor:
    """Return c_1 z_1 + ... + c_n z_n of one tile, of the draws from a first one on.

    A draw is a key and the bits of a coefficient.
    """
    moved = tl.zeros((32 // BITS, TILE * BITS // 32), WIDE)
    for turn in range(count):
        draw = draws_ptr + 2 * (first + turn)
        key = tl.load(draw)
        c = tl.load(draw + 1).to(tl.float64, bitcast=True).to(WIDE)
        if KIND == "gaussian":
            found = normals(key, parameter, STREAM, tile, TILE)
        else:
            found = fields(key, parameter, STREAM, tile, BITS, TILE).to(tl.int32)
        moved += scaled(found, c, normals_ptr, KIND, WIDE)
    return moved


@triton.jit
def _chosen(
    row: tl.tensor,
    stored: tl.tensor,
    parameter: tl.tensor,
    tile: tl.tensor,
    WIDE: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    STREAM: tl.constexpr,
) -> tl.tensor:
    """Return which weights of one tile move."""
    if MASK == 1:
        edge = tl.load(row + 8).to(tl.float64, bitcast=True).to(WIDE)
        found = tl.abs(stored.to(WIDE)) <= edge
    elif MASK == 2:
        limit = tl.load(row + 8).to(tl.int32)
        drawn = fields(tl.load(row + 7), parameter, STREAM, tile, 16, TILE).to(tl.int32)
        found = tl.reshape(drawn, (ROWS, COLS)) < limit
    else:
        found = tl.full((ROWS, COLS), 1, tl.int1)
    return found
