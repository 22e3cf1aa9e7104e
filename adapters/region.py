"""Parts of a weight that an adapter overwrites and puts back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sft.kernels.expert_lines import read_expert_lines, write_expert_lines_
from sft.kernels.gather import gather
from sft.kernels.lines import read_lines, write_lines_
from sft.kernels.write import write_


class Region(Protocol):
    """Where in a weight an adapter lies. The same object is the same place."""

    def read(self, weight: Tensor) -> Tensor:
        """Return a copy of the region, in the shape of the adapter's values."""

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Assign the region, in the weight's dtype and past autograd's version counter."""

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Region:
        """Return the region with `fn` applied to its tensors: a move to a device, a copy."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Single weights.

    Args:
        indices: (k,) flat positions; values are (k,).
    """

    indices: Tensor

    def read(self, weight: Tensor) -> Tensor:
        """Return (k,)."""
        return gather(weight, self.indices)

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Assign (k,)."""
        write_(weight, self.indices, values)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Positions:
        """Apply `fn` to the indices."""
        return Positions(fn(self.indices))


@dataclass(frozen=True, eq=False)
class Lines:
    """Whole rows or columns.

    Args:
        axis: 0 for rows, 1 for columns.
        indices: (s,) which; values are (s, length of a line) for rows and columns alike.
    """

    axis: int
    indices: Tensor

    def read(self, weight: Tensor) -> Tensor:
        """Return (s, length of a line)."""
        return read_lines(weight, self.indices, self.axis)

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Assign (s, length of a line)."""
        write_lines_(weight, self.indices, self.axis, values)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Lines:
        """Apply `fn` to the indices."""
        return Lines(self.axis, fn(self.indices))


@dataclass(frozen=True, eq=False)
class ExpertLines:
    """Rows or columns of single experts in a 3-D parameter.

    Args:
        axis: 1 if the lines are rows of an expert's matrix, 2 if they are columns.
        experts: (s,) int64, the expert of each line.
        indices: (s,) int64, which line of it; values are (s, length of a line).
    """

    axis: int
    experts: Tensor
    indices: Tensor

    def read(self, weight: Tensor) -> Tensor:
        """Return (s, length of a line)."""
        return read_expert_lines(weight, self.experts, self.indices, self.axis)

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Assign (s, length of a line)."""
        write_expert_lines_(weight, self.experts, self.indices, self.axis, values)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> ExpertLines:
        """Apply `fn` to experts and indices."""
        return ExpertLines(self.axis, fn(self.experts), fn(self.indices))


@dataclass(frozen=True, eq=False)
class Whole:
    """All of the weight."""

    def read(self, weight: Tensor) -> Tensor:
        """Return a copy of the weight."""
        return weight.detach().clone()

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Assign every entry."""
        assert values.dtype == weight.dtype
        weight.data.copy_(values.detach())

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Whole:
        """Return itself: it has no tensors."""
        return self
