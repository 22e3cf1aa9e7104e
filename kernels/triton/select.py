"""Order statistics on a GPU by histograms of bits: no sorting, nothing of the tensors' size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.triton.table import address, place, sent, table

BLOCK = 4096
CHUNK = 16 * BLOCK  # entries of a program, which adds its histogram to the others' once

# Bits of a code that each pass counts. On an H100 a pass takes 60 instructions an entry, twice the
# time of reading float32 (a model, not measured); with 11 bits it takes 230, and spills soon.
WIDTH = 8
_INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
_STORED = {16: tl.int16, 32: tl.int32, 64: tl.int64}
_RAW = {16: tl.uint16, 32: tl.uint32, 64: tl.uint64}


def magnitude_thresholds(weights: Sequence[Tensor], share: float) -> Tensor:
    """Launch `sft.kernels.magnitude_threshold.magnitude_thresholds`."""
    out = torch.empty(len(weights), dtype=torch.float64, device=weights[0].device)
    groups: dict[torch.dtype, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault(weight.dtype, []).append(i)
    for dtype, chosen in groups.items():
        flat = [weights[i].detach().contiguous().view(-1) for i in chosen]
        codes = _nth(flat, [math.ceil(share * len(w)) for w in flat], magnitude=True)
        found = codes.to(_INTEGERS[8 * dtype.itemsize]).view(dtype).double()
        out[sent(torch.tensor(chosen, device="cpu"), out.device)] = found
    return out


def top_k(scores: Tensor, k: int) -> Tensor:
    """Launch `sft.kernels.topk.top_k`: once the k-th is known, count before each block, and store.

    Every size is known beforehand, so the host waits for nothing.
    """
    flat, size = scores.detach().contiguous().view(-1), scores.numel()
    threshold = _nth([flat], [size - k + 1], magnitude=False)
    blocks, bits = triton.cdiv(size, BLOCK), 8 * flat.element_size()
    counts = torch.empty(2, blocks, dtype=torch.int64, device=flat.device)
    found = torch.empty(k, dtype=torch.int64, device=flat.device)
    held = flat.view(_INTEGERS[bits])
    with torch.cuda.device_of(flat):  # type: ignore[no-untyped-call]
        above_kernel[(blocks,)](
            counts, held, threshold, size, blocks, RAW=_RAW[bits], BITS=bits, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
        ties = k - counts[0].sum()
        positions_kernel[(blocks,)](
            found, counts.cumsum(1) - counts, held, threshold, ties, size, blocks,
            RAW=_RAW[bits], BITS=bits, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return found


def _nth(flat: Sequence[Tensor], wanted: Sequence[int], *, magnitude: bool) -> Tensor:
    """Return the code of the wanted-th smallest entry of each tensor, (n,) int64.

    Codes are in the order of the entries, or of their magnitudes. Each pass over the tensors finds
    some more of their bits, and no number comes to the host in between.
    """
    device, bits = flat[0].device, 8 * flat[0].element_size()
    rows = table([flat], block=CHUNK)
    code = torch.zeros(len(flat), dtype=torch.int64, device=device)
    rest = sent(torch.tensor(wanted, dtype=torch.int64, device="cpu"), device)
    for shift in range(bits - WIDTH, -1, -WIDTH):
        histogram = torch.zeros(len(flat), 2**WIDTH, dtype=torch.int64, device=device)
        with torch.cuda.device_of(flat[0]):  # type: ignore[no-untyped-call]
            histogram_kernel[(len(rows.blocks),)](
                rows.rows, rows.blocks, code, histogram, shift,
                STORED=_STORED[bits], RAW=_RAW[bits], BITS=bits, WIDTH=WIDTH, MAGNITUDE=magnitude,
                ALIGNED=rows.aligned, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8,
            )  # fmt: skip
        reached = histogram.cumsum(1)
        found = torch.searchsorted(reached, rest[:, None])
        rest = rest - (reached - histogram).gather(1, found)[:, 0]
        code = code << WIDTH | found[:, 0]
    return code


@triton.jit(do_not_specialize=["shift"])
def histogram_kernel(
    rows_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    code_ptr: tl.tensor,
    histogram_ptr: tl.tensor,
    shift: tl.int32,
    STORED: tl.constexpr,
    RAW: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Count the next WIDTH bits of the codes that begin with those found so far, of one chunk."""
    number = tl.load(blocks_ptr + 2 * tl.program_id(0).to(tl.int64)).to(tl.int64)
    row, first, size = place(rows_ptr, blocks_ptr, 2, CHUNK)
    held_ptr = address(row, 1, STORED, ALIGNED) + first
    known = tl.load(code_ptr + number)
    inside = tl.arange(0, BLOCK)
    counted = tl.zeros((1 << WIDTH,), tl.int32)
    left = tl.minimum(size - first, CHUNK).to(tl.int32)
    whole = left // BLOCK
    # only the last block takes a mask, which would break 128-bit loads
    for turn in range(whole):
        held = tl.load(held_ptr + turn * BLOCK + inside)
        counted += _counts(held, known, inside >= 0, shift, RAW, BITS, WIDTH, MAGNITUDE)
    if left > whole * BLOCK:
        here = inside < left - whole * BLOCK
        held = tl.load(held_ptr + whole * BLOCK + inside, mask=here, other=0)
        counted += _counts(held, known, here, shift, RAW, BITS, WIDTH, MAGNITUDE)
    bins = tl.arange(0, 1 << WIDTH)
    to = histogram_ptr + number * (1 << WIDTH) + bins
    # sums of integers are the same in any order
    tl.atomic_add(to, counted.to(tl.int64), mask=counted > 0, sem="relaxed")


@triton.jit
def _counts(
    held: tl.tensor,
    known: tl.tensor,
    here: tl.tensor,
    shift: tl.tensor,
    RAW: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAGNITUDE: tl.constexpr,
) -> tl.tensor:
    code = _code(held, RAW, BITS, MAGNITUDE)
    code = code >> shift.to(code.dtype)
    bins = (code & ((1 << WIDTH) - 1)).to(tl.int32)
    return tl.histogram(bins, 1 << WIDTH, mask=here & (code >> WIDTH == known.to(code.dtype)))


@triton.jit
def _code(
    held: tl.tensor, RAW: tl.constexpr, BITS: tl.constexpr, MAGNITUDE: tl.constexpr
) -> tl.tensor:
    """Return unsigned integers in the order of the floats whose bits are held; -0 is 0."""
    CODE: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    raw = held.to(RAW, bitcast=True).to(CODE)
    sign = tl.full(held.shape, 1, CODE) << (BITS - 1)
    if MAGNITUDE:
        code = raw & (sign - 1)
    else:
        raw = tl.where(raw == sign, 0, raw).to(CODE)
        code = tl.where(raw >= sign, (sign - 1) - (raw - sign), raw + sign)
    return code


@triton.jit
def above_kernel(
    counts_ptr: tl.tensor,
    held_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    size: tl.int64,
    blocks: tl.int32,
    RAW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count how many of one block are above the threshold, and how many are equal to it."""
    above, equal = _compared(held_ptr, threshold_ptr, size, RAW, BITS, BLOCK)
    number = tl.program_id(0)
    tl.store(counts_ptr + number, tl.sum(above.to(tl.int32), 0).to(tl.int64))
    tl.store(counts_ptr + blocks + number, tl.sum(equal.to(tl.int32), 0).to(tl.int64))


@triton.jit
def positions_kernel(
    found_ptr: tl.tensor,
    before_ptr: tl.tensor,
    held_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    ties_ptr: tl.tensor,
    size: tl.int64,
    blocks: tl.int32,
    RAW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store the positions of one block that are above the threshold, or early ties, ascending."""
    above, equal = _compared(held_ptr, threshold_ptr, size, RAW, BITS, BLOCK)
    number = tl.program_id(0)
    ties = tl.load(ties_ptr)
    ties_before = tl.load(before_ptr + blocks + number)
    early = tl.cumsum(equal.to(tl.int32), 0) <= ties - ties_before
    chosen = above | (equal & early)
    start = tl.load(before_ptr + number) + tl.minimum(ties_before, ties)
    at = start + tl.cumsum(chosen.to(tl.int32), 0) - 1
    position = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found_ptr + at, position, mask=chosen)


@triton.jit
def _compared(
    held_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    size: tl.int64,
    RAW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return which entries of this program's block are above the threshold, and which equal."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    here = inside < size - first
    if first + BLOCK <= size:
        held = tl.load(held_ptr + first + inside)
    else:
        held = tl.load(held_ptr + first + inside, mask=here, other=0)
    code = _code(held, RAW, BITS, False)
    threshold = tl.load(threshold_ptr).to(code.dtype)
    return here & (code > threshold), here & (code == threshold)
