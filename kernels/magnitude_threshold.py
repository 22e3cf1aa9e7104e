"""The magnitude below which a share of a tensor lies, by counting instead of sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.library import define

CODES = 2**15  # magnitudes that 16 bits hold, or the upper half of 32
PIECE = 2**20


def magnitude_threshold(weight: Tensor, share: float) -> float:
    """Return the smallest h such that at least ceil(share * numel) entries have |w| <= h.

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
    return float(magnitude_thresholds([weight], share)[0])


@torch.no_grad()
def magnitude_thresholds(weights: Sequence[Tensor], share: float) -> Tensor:
    """Return the threshold of each of many tensors, at once on a GPU.

    Args:
        weights: each as `magnitude_threshold` takes it, all on one device.
        share: of each.

    Returns:
        (n,) float64, on the device of the weights.

    Raises:
        ValueError: the share is out of range or a tensor is empty.
    """
    for weight in weights:
        if not 0 < share <= 1 or weight.numel() == 0:
            raise ValueError(
                f"share: got {share!r} of {weight.numel()} weights, allowed is (0, 1] of at least "
                "one; leave empty tensors out"
            )
    if not weights:
        return torch.empty(0, dtype=torch.float64)
    found: Tensor = MAGNITUDE_THRESHOLDS(list(weights), share)
    return found


def _magnitude_thresholds(weights: list[Tensor], share: float) -> Tensor:
    found = [_threshold(weight.detach().flatten(), share) for weight in weights]
    return torch.tensor(found, dtype=torch.float64, device=weights[0].device)


MAGNITUDE_THRESHOLDS = define(
    "magnitude_thresholds(Tensor[] weights, float share) -> Tensor",
    plain=_magnitude_thresholds,
    triton="select:magnitude_thresholds",
    fake=lambda weights, share: weights[0].new_empty(len(weights), dtype=torch.float64),
)


def _threshold(flat: Tensor, share: float) -> float:
    """Count: without their sign bit, floats are in the order of their bits.

    A histogram of the upper 15 bits finds the bin that holds h; a second one, of that bin's
    members, the lower bits.
    """
    wanted = math.ceil(share * flat.numel())
    if flat.dtype == torch.float64:
        return float(flat.abs().kthvalue(wanted).values)
    if flat.element_size() == 2:
        code, _ = _nth(flat, wanted, lambda piece: piece.view(torch.int16).int() & CODES - 1, CODES)
        return float(_magnitude(code, torch.int16, flat.dtype))
    upper, rest = _nth(flat, wanted, lambda piece: piece.view(torch.int32) >> 16 & CODES - 1, CODES)

    def lower(piece: Tensor) -> Tensor:
        bits = piece.view(torch.int32)
        return bits[bits >> 16 & CODES - 1 == upper] & 0xFFFF

    code, _ = _nth(flat, rest, lower, 2 * CODES)
    return float(_magnitude(upper << 16 | code, torch.int32, flat.dtype))


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
