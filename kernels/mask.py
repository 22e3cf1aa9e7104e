"""Which weights of a tensor move: by magnitude, or at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sft.kernels.noise import MASK, TILE, Run, fields, fields_at, signed, tile_words


@dataclass(frozen=True)
class Magnitude:
    """Move the weights of small magnitude: |w| <= threshold, of the value that is read."""

    threshold: float

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold: got {self.threshold!r}, allowed is a finite number >= 0")

    def hide(self, moved: Tensor, weight: Tensor, run: Run, first: int) -> None:
        """Zero what is subtracted from large weights."""
        # passes what is strictly between the edges, in one pass over both
        edge = _above(self.threshold, weight.dtype)
        torch.ops.aten.hardtanh_backward.grad_input(moved, weight, -edge, edge, grad_input=moved)

    def plainly(self) -> tuple[int, int, float, int]:
        """Return what compiled code takes: the kind, a key, a bound in float32, one of 16 bits."""
        return MAGNITUDE, 0, at_most(self.threshold, torch.float32), 0


@dataclass(frozen=True)
class Random:
    """Move a random part of the weights, the same for the same key.

    Args:
        key: 64 bits.
        share: how much is moved, in (0, 1], as a multiple of 2^-16.
    """

    key: int
    share: float

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.limit):
            raise ValueError(f"share: got {self.share!r}, allowed is [2**-16, 1]")

    @property
    def limit(self) -> int:
        """A weight moves if its 16 random bits are below this."""
        return round(self.share * 2**16)

    def hide(self, moved: Tensor, weight: Tensor, run: Run, first: int) -> None:
        """Zero what is subtracted from weights that were not drawn."""
        words = tile_words(self.key, [run], "gaussian_table", MASK)
        field = fields(words).view(-1)[first : first + len(moved)]
        moved.masked_fill_(field >= self.limit, 0.0)

    def plainly(self) -> tuple[int, int, float, int]:
        """Return what compiled code takes: the kind, a key, a bound in float32, one of 16 bits."""
        return RANDOM, self.key % 2**64, 0.0, self.limit


Mask: TypeAlias = "Magnitude | Random"

# How an op is told of a mask: kind, key as a signed integer, threshold or share.
NONE, MAGNITUDE, RANDOM = range(3)


def mask_of(weight: Tensor, parameter: int, mask: Mask) -> Tensor:
    """Return a mask as booleans of the weight's shape: a byte a weight, for reports and tests."""
    if isinstance(mask, Magnitude):
        return weight.abs().double() <= mask.threshold
    tiles = -(-weight.numel() // TILE)
    words = tile_words(mask.key, [Run(parameter, 0, tiles)], "gaussian_table", MASK)
    chosen = fields(words).view(-1)[: weight.numel()].view(weight.shape)
    return (chosen < mask.limit).to(weight.device)


def mask_at(weight: Tensor, positions: Tensor, parameter: int, mask: Mask) -> Tensor:
    """Return the mask at single flat positions, of which `weight` holds the values."""
    if isinstance(mask, Magnitude):
        return weight.abs().double() <= mask.threshold
    chosen = fields_at(mask.key, parameter, positions, "gaussian_table", MASK) < mask.limit
    return chosen.to(weight.device)


def coded(masks: Sequence[Mask | None]) -> tuple[list[int], list[int], list[float]]:
    """Return kinds, keys and limits, as ops take them."""
    rows = [_coded(mask) for mask in masks]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _coded(mask: Mask | None) -> tuple[int, int, float]:
    if isinstance(mask, Random):
        return RANDOM, signed(mask.key), mask.share
    return (NONE, 0, 0.0) if mask is None else (MAGNITUDE, 0, mask.threshold)


def decoded(kind: int, key: int, limit: float) -> Mask | None:
    """Return the mask that an op was told of."""
    if kind == RANDOM:
        return Random(key % 2**64, limit)
    return None if kind == NONE else Magnitude(limit)


def at_most(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of the dtype (float64, or else float32) up to a threshold."""
    if dtype == torch.float64:
        return threshold
    found = np.float32(threshold)
    if float(found) > threshold:  # numpy would round the threshold to the dtype first
        found = np.nextafter(found, np.float32(-math.inf))
    return float(found)


def _above(threshold: float, dtype: torch.dtype) -> float:
    """Return the smallest number of the dtype above a threshold."""
    number = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(number(at_most(threshold, dtype)), number(math.inf)))
