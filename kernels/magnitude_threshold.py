"""The magnitude below which a share of a tensor lies, by counting instead of sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CODES = 2**15  # magnitudes that 16 bits hold, or the upper half of 32
PIECE = 2**20


@torch.no_grad()
def magnitude_threshold(weight: Tensor, share: float) -> float:
    """Return the smallest h such that at least ceil(share * numel) entries have |w| <= h.

    Without their sign bit, floats are in the order of their bits. A histogram of the upper 15 bits
    finds the bin that holds h; a second one, of that bin's members, the lower bits.

    Args:
        weight: any shape and layout, float16, bfloat16, float32 or float64, without NaN.
        share: in (0, 1]; ties with h count as well, so more entries may lie within it.

    Returns:
        one of the magnitudes of the tensor.

    Raises:
        ValueError: the share is out of range or the tensor is empty.

    Paper: Sparse MeZO, arXiv 2402.15751, section 3.2, whose percentile of each layer this is; its
    GetMask leaves the absolute value out, its text does not.
    """
    if not 0 < share <= 1 or weight.numel() == 0:
        raise ValueError(
            f"share: got {share!r} of {weight.numel()} weights, allowed is (0, 1] of at least one"
        )
    wanted = math.ceil(share * weight.numel())
    if weight.dtype == torch.float64:
        return float(weight.abs().flatten().kthvalue(wanted).values)
    flat = weight.detach().flatten()
    if weight.element_size() == 2:
        code, _ = _nth(flat, wanted, lambda piece: piece.view(torch.int16).int() & CODES - 1, CODES)
        return float(_magnitude(code, torch.int16, weight.dtype))
    upper, rest = _nth(flat, wanted, lambda piece: piece.view(torch.int32) >> 16 & CODES - 1, CODES)

    def lower(piece: Tensor) -> Tensor:
        bits = piece.view(torch.int32)
        return bits[bits >> 16 & CODES - 1 == upper] & 0xFFFF

    code, _ = _nth(flat, rest, lower, 2 * CODES)
    return float(_magnitude(upper << 16 | code, torch.int32, weight.dtype))


def _nth(flat: Tensor, wanted: int, code: object, count: int) -> tuple[int, int]:
    """Return the code of the wanted-th smallest, and how many of its bin are wanted."""
    assert callable(code)
    histogram = torch.zeros(count, dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), PIECE):
        histogram += torch.bincount(code(flat[start : start + PIECE]), minlength=count)
    reached = histogram.cumsum(0)
    found = int(torch.searchsorted(reached, wanted))
    return found, wanted - (int(reached[found - 1]) if found else 0)


def _magnitude(code: int, integer: torch.dtype, dtype: torch.dtype) -> Tensor:
    return torch.tensor(code, dtype=integer).view(dtype)


def magnitude_threshold_reference(weight: Tensor, share: float) -> float:
    """Oracle of `magnitude_threshold`: a sorted list."""
    magnitudes: list[float] = sorted(abs(value) for value in weight.double().flatten().tolist())
    return magnitudes[math.ceil(share * len(magnitudes)) - 1]
