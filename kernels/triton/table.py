"""One launch over many tensors: a table of their addresses, and a tensor for each program."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # entries of a program

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
}


class Table(NamedTuple):
    """What the programs of one launch read first.

    Args:
        rows: (tensors, columns) int64: entries of each tensor, then addresses and plain numbers.
        blocks: (programs, 2) int32: the tensor of each program, and which of its blocks.
        aligned: all addresses that are streamed are multiples of 16 bytes.
    """

    rows: Tensor
    blocks: Tensor
    aligned: bool


def table(
    streamed: Sequence[Sequence[Tensor]],
    *others: Sequence[Tensor] | Sequence[int],
    sizes: Sequence[int] = (),
    block: int = BLOCK,
) -> Table:
    """Build the table of tensors of one device, or find it: the same addresses, the same table.

    Args:
        streamed: columns of contiguous tensors that are read and written entry after entry; the
            tensors of a row have one size.
        others: columns of contiguous tensors that are looked up at random, or of numbers: bits of
            floats.
        sizes: entries of each tensor, if not all of the first column's.
        block: entries of a program.

    Raises:
        ValueError: tensors do not fit. A kernel that is given addresses alone would not see it.
    """
    first, device = streamed[0], streamed[0][0].device
    counts = [tensor.numel() for tensor in first]
    for column in streamed[1:]:
        if (found := [tensor.numel() for tensor in column]) != counts:
            raise ValueError(f"tensors: got {found} entries beside {counts}, allowed are as many")
    addresses = [_addresses(column, device) for column in streamed]
    aligned = not any(address & 15 for column in addresses for address in column)
    sizes = tuple(sizes or counts)
    rest = [_addresses(column, device) for column in others]
    rows = tuple(zip(sizes, *addresses, *rest, strict=True))
    return Table(_rows(rows, device), _blocks(sizes, block, device), aligned)


def _addresses(column: Sequence[Tensor] | Sequence[int], device: torch.device) -> list[int]:
    """Return where tensors begin that a kernel may walk through; numbers are what they are."""
    found = []
    for entry in column:
        if isinstance(entry, Tensor):
            if entry.device != device or not entry.is_contiguous():
                raise ValueError(
                    f"tensors: got strides {entry.stride()} on {entry.device}, allowed are "
                    f"contiguous ones on {device}; copy them"
                )
            entry = entry.data_ptr()
        found.append(entry)
    return found


def alike(*columns: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Yield the rows of equal devices and dtypes as columns again; rows without entries are left.

    An empty column stays empty.
    """
    given = [column for column in columns if column]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(zip(*given, strict=True)):
        if row[0].numel():
            kind = (row[0].device, *(tensor.dtype for tensor in row))
            groups.setdefault(kind, []).append(i)
    for chosen in groups.values():
        yield [[column[i] for i in chosen] if column else [] for column in columns]


# Keyed by the addresses themselves, a table cannot be stale. What is kept is a few kilobytes each.
@functools.lru_cache(maxsize=32)
def _rows(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


@functools.lru_cache(maxsize=32)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    counts = torch.tensor([triton.cdiv(size, block) for size in sizes], device="cpu")
    tensors = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
    first = torch.tensor([0, *itertools.accumulate(counts.tolist())], device="cpu")
    numbers = torch.arange(len(tensors), device="cpu") - first[tensors]
    return sent(torch.stack([tensors, numbers], 1).to(torch.int32), device)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; the copy does not wait for it."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@triton.jit
def place(
    rows_ptr: tl.tensor, blocks_ptr: tl.tensor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return this program's row of the table, its first entry, and how many its tensor has."""
    block = blocks_ptr + 2 * tl.program_id(0).to(tl.int64)
    row = rows_ptr + tl.load(block).to(tl.int64) * COLUMNS
    # a flat index may pass 2^31
    return row, tl.load(block + 1).to(tl.int64) * BLOCK, tl.load(row)


@triton.jit
def address(
    row: tl.tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Return the address in a column; memory moves by 128 bits where it is known to be aligned."""
    found = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found
