"""Gradient of a matrix at chosen positions, without the dense gradient."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sft.kernels.pattern import Pattern

# A dense row block is at most this large; smaller blocks cost up to 1.8x in GEMM efficiency.
BLOCK_BYTES = 16 * 2**20
# Densities up to which one dot product per position beats dense row blocks. CPU: measured by
# benchmarks/crossover.py. Elsewhere: tensor cores move the crossover down (a model, not measured).
SAMPLED_UP_TO = {"cpu": 0.10}
SAMPLED_UP_TO_ELSEWHERE = 0.0025


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
    run takes the same one.
    """
    left, right = widen(left), widen(right)
    if len(pattern) == 0 or left.shape[0] == 0:
        return right.new_zeros(len(pattern))
    if uses_sampled(pattern, left.device):
        return _sampled(left, right, pattern)
    return _row_blocks(left, right, pattern)


def uses_sampled(pattern: Pattern, device: torch.device) -> bool:
    """Tell whether `outer_at` takes one dot product per position rather than dense row blocks."""
    return pattern.density <= SAMPLED_UP_TO.get(device.type, SAMPLED_UP_TO_ELSEWHERE)


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype sums are taken in: float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rows_per_block(cols: int, itemsize: int) -> int:
    """Return how many rows of `cols` entries fit a block."""
    return max(1, BLOCK_BYTES // max(1, cols * itemsize))


def _sampled(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Sampled dense-dense product (SDDMM): 2 * tokens * k operations."""
    zeros = right.new_zeros(len(pattern))
    # CSR keeps the ascending order of the flat positions, so the result needs no permutation
    where = torch.sparse_csr_tensor(
        pattern.row_pointers, pattern.columns, zeros, pattern.shape, check_invariants=False
    )
    products: Tensor = torch.sparse.sampled_addmm(where, left.t(), right, beta=0.0)
    return products.values()


def _row_blocks(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Dense product of one row block after another; peak memory is one block."""
    step = rows_per_block(right.shape[1], right.element_size())
    parts = []
    for start in range(0, pattern.shape[0], step):
        inside = pattern.between(start, min(start + step, pattern.shape[0]))
        if inside.numel():
            block = left[:, start : start + step].t() @ right
            parts.append(block.view(-1).index_select(0, inside))
    return torch.cat(parts)


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
