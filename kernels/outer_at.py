"""Gradient of a matrix at chosen positions, without the dense gradient."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sft.kernels.cpu.turn import turned
from sft.kernels.library import define
from sft.kernels.pattern import Pattern

# A dense row block is at most this large; smaller blocks cost up to 1.8x in GEMM efficiency.
BLOCK_BYTES = 16 * 2**20
# Densities up to which one dot product per position beats dense row blocks, where that is measured
# (benchmarks/crossover.py); elsewhere a model of both tells.
SAMPLED_UP_TO = {"cpu": 0.10}

# Seconds on an H100, by a model of the compiled kernels in bfloat16 (not measured): to read an
# operand's entry from the cache for a dot product, to turn one for that, and to multiply one entry
# of a dense tile. A program of dot products has so many positions, and reads rows they share once.
READ_SECONDS, TURN_SECONDS, TILE_SECONDS = 4.55e-13, 1.33e-12, 3.1e-15
MULTIPROCESSORS, POSITIONS = 132, 16

# torch 2.8 learned to keep the float32 that GPUs accumulate half-precision products in
_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")


def outer_at(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Return (left^T right) at the positions of `pattern`, accumulated in float32 or wider.

    out[j] = sum_t left[t, r_j] * right[t, c_j]. For y = x W^T the gradient of W is G^T X.

    Args:
        left: (tokens, rows), any float dtype.
        right: (tokens, cols), the same dtype.
        pattern: k positions of the (rows, cols) product.

    Returns:
        (k,) float32, or float64 for float64 operands.

    The path depends on shape, density and device type alone, never on a timing, so that a resumed
    run takes the same one. Few positions: one dot product each. Many: dense row blocks on
    the CPU, dense tiles in registers on a GPU; a dense gradient is never stored.
    """
    if uses_sampled(pattern, left.device):
        view = pattern.indices, pattern.row_pointers, pattern.columns
        found: Tensor = SAMPLED_OUTER(left, right, *view)
    else:
        side = tile_side(pattern.shape)
        # row blocks need no tiles
        tiles = pattern.tiles(side) if left.device.type != "cpu" else (pattern.indices[:0],) * 2
        found = TILED_OUTER(left, right, pattern.indices, *tiles, side)
    return found


def uses_sampled(pattern: Pattern, device: torch.device) -> bool:
    """Tell whether `outer_at` takes one dot product per position rather than dense blocks.

    On GPUs, of k positions of an (m, n) matrix: where

        (k + min(k, k / POSITIONS + m)) READ + (m + n) TURN <= m n TILE / share of the GPU in use

    by the model. Both sides grow alike with the tokens, which leave the rule.
    """
    if device.type in SAMPLED_UP_TO:
        return pattern.density <= SAMPLED_UP_TO[device.type]
    rows, cols = pattern.shape
    side = tile_side(pattern.shape)
    in_use = min(1.0, math.ceil(rows / side) * math.ceil(cols / side) / MULTIPROCESSORS)
    reads = len(pattern) + min(len(pattern), len(pattern) / POSITIONS + rows)
    sampled = reads * READ_SECONDS + (rows + cols) * TURN_SECONDS
    return sampled * in_use <= rows * cols * TILE_SECONDS


def tile_side(shape: tuple[int, int]) -> int:
    """Return the side of a dense tile: 128, or 64 where that leaves multiprocessors idle."""
    return 128 if shape[0] * shape[1] >= 2 * MULTIPROCESSORS * 128**2 else 64


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype sums are taken in: float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right, (rows, cols), in float32 or wider from operands of any float dtype."""
    half = left.dtype in (torch.float16, torch.bfloat16)
    if _WIDE_PRODUCTS and half and left.device.type == "cuda":
        wide: Tensor = torch.mm(left.t(), right, out_dtype=torch.float32)
        return wide
    return widen(left).t() @ widen(right)


def rows_per_block(cols: int, itemsize: int) -> int:
    """Return how many rows of `cols` entries fit a block."""
    return max(1, BLOCK_BYTES // max(1, cols * itemsize))


def _sampled(
    left: Tensor, right: Tensor, indices: Tensor, row_pointers: Tensor, columns: Tensor
) -> Tensor:
    """Sampled dense-dense product (SDDMM): 2 * tokens * k operations."""
    left, right = widen(left), widen(right)
    zeros = right.new_zeros(indices.numel())
    if left.shape[0] == 0 or indices.numel() == 0:
        return zeros
    # CSR keeps the ascending order of the flat positions, so the result needs no permutation
    shape = left.shape[1], right.shape[1]
    where = torch.sparse_csr_tensor(row_pointers, columns, zeros, shape, check_invariants=False)
    if left.device.type == "cpu":
        # it reads tokens side by side, and would turn what has them apart itself, slowly
        rows, cols = turned(left, "left"), turned(right, "right").t()
    else:
        rows, cols = left.t(), right
    products: Tensor = torch.sparse.sampled_addmm(where, rows, cols, beta=0.0)
    return products.values()


def row_blocks(
    left: Tensor, right: Tensor, indices: Tensor, order: Tensor, pointers: Tensor, side: int
) -> Tensor:
    """Implement `TILED_OUTER` in torch: one dense row block after another, of bounded size."""
    if left.device.type == "cpu":
        left, right = widen(left), widen(right)
    rows, cols = left.shape[1], right.shape[1]
    pattern, step = Pattern(indices, (rows, cols)), rows_per_block(cols, widen(right[:0]).itemsize)
    parts = [widen(right[:0]).new_empty(0)]
    for start in range(0, rows, step):
        inside = pattern.between(start, min(start + step, rows))
        if inside.numel():
            block = wide_product(left[:, start : start + step], right)
            parts.append(block.view(-1).index_select(0, inside))
    return torch.cat(parts)


def _fake(left: Tensor, right: Tensor, indices: Tensor, *rest: object) -> Tensor:
    wide = torch.promote_types(left.dtype, torch.float32)
    return indices.new_empty(indices.numel(), dtype=wide)


SAMPLED_OUTER = define(
    "sampled_outer(Tensor left, Tensor right, Tensor indices, Tensor row_pointers, Tensor columns) "
    "-> Tensor",
    plain=_sampled,
    triton="sampled:sampled_outer",
    fake=_fake,
)
TILED_OUTER = define(
    "tiled_outer(Tensor left, Tensor right, Tensor indices, Tensor order, Tensor pointers, "
    "int side) -> Tensor",
    plain=row_blocks,
    triton="tiles:tiled_outer",
    fake=_fake,
)


def outer_at_reference(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Oracle of `outer_at`: the dense product in float64 (SpIEL, arXiv 2401.16405, eq. of dW)."""
    dense = torch.einsum("tr,tc->rc", left.double(), right.double())
    return dense.flatten()[pattern.indices.long()].to(widen(right[:0]).dtype)


def _announce_csr() -> None:
    """Let torch say once, here and unheard, that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), empty, torch.zeros(0), (1, 1))


_announce_csr()
