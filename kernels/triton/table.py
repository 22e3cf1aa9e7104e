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
    *others: Sequence[int],
    sizes: Sequence[int] = (),
    block: int = BLOCK,
) -> Table:
    """Build the table of tensors of one device, or find it: the same addresses, the same table.

    Args:
        streamed: columns of contiguous tensors that are read and written entry after entry; the
            tensors of a row have one size.
        others: columns of numbers: addresses that are looked up at random, bits of floats.
        sizes: entries of each tensor, if not all of the first column's.
        block: entries of a program.
    """
    first = streamed[0]
    sizes = tuple(sizes) or tuple(tensor.numel() for tensor in first)
    addresses = [tuple(tensor.data_ptr() for tensor in column) for column in streamed]
    aligned = not any(address & 15 for column in addresses for address in column)
    rows = tuple(zip(sizes, *addresses, *others, strict=True))
    return Table(_rows(rows, first[0].device), _blocks(sizes, block, first[0].device), aligned)


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
