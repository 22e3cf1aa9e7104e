"""The nearest low-rank product to a delta, and how far it is away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sft.errors import UserError

RANK, ERROR = 64, 0.05
_EXACT = 1e-6  # what float32 leaves of a delta that is a product of few ranks


class Factors(NamedTuple):
    """What stock LoRA adds at a scale of 1: y = base(x) + x A^T B^T."""

    a: Tensor  # (r, in), float32
    b: Tensor  # (out, r)

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.a)


@dataclass(frozen=True)
class Approximation:
    """How deltas without a low rank are rounded to one.

    Args:
        max_error: largest |delta - B A| / |delta| of a module, in Frobenius norms.
        max_rank: of a module. One that has no higher rank is not rounded; others take the smallest
            that keeps the error.
    """

    max_error: float = ERROR
    max_rank: int = RANK

    def __post_init__(self) -> None:
        if not 0 <= self.max_error < 1:
            raise UserError(f"--max-error: got {self.max_error}, allowed is 0 <= max-error < 1")
        if self.max_rank < 1:
            raise UserError(f"--rank: got {self.max_rank}, allowed is 1 or more")

    def apply(self, name: str, delta: Tensor) -> tuple[Factors, float]:
        """Return the factors of a module, and their relative error.

        Args:
            name: of the module, for the message.
            delta: (out, in).

        Raises:
            UserError: the error is larger than allowed at the highest rank.
        """
        if not bool(delta.isfinite().all()):
            raise UserError(f"--to lora: {name} holds values that are not finite; train it again")
        factors, error, needed = nearest(delta, _EXACT, self.max_rank)
        if needed > self.max_rank:
            factors, error, needed = nearest(delta, self.max_error, self.max_rank)
        if needed > self.max_rank:
            raise UserError(
                f"--max-error: {name} is {error:.3g} away from rank {self.max_rank}, allowed is "
                f"{self.max_error:g}, which takes rank {needed} of {min(delta.shape)}; raise "
                "--rank or --max-error, or take --to merged, or --to shira for a sparse delta"
            )
        return factors, error


def nearest(delta: Tensor, max_error: float, max_rank: int) -> tuple[Factors, float, int]:
    """Return the best product of at most a rank, by its singular values.

    delta = U diag(s) V^T; B A = U_r diag(s_r) V_r^T; the error is |s_{r+1..}| / |s|.

    Args:
        delta: (out, in).
        max_error: relative.
        max_rank: of the product.

    Returns:
        The factors of the smallest rank that keeps the error, or of `max_rank`; their relative
        error; and the rank that keeps it.
    """
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    # what is left out beyond each rank: sums from the small end lose nothing
    beyond = torch.cat([s.double().square().flip(0).cumsum(0).flip(0), s.new_zeros(1).double()])
    errors = (beyond / beyond[0].clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    needed = int((errors > max_error).sum())
    rank = min(needed, max_rank)
    root = s[:rank].sqrt()
    factors = Factors(root[:, None] * v[:rank], u[:, :rank] * root)
    return factors, float(errors[rank]), needed
